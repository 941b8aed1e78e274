import { cn } from '@/lib/cn'

export function Logo({ className }: { className?: string }) {
  return (
    <svg viewBox="0 0 32 32" className={cn('size-6', className)} aria-hidden="true">
      <rect width="32" height="32" rx="8" className="fill-[oklch(0.22_0.006_60)] dark:fill-[oklch(0.262_0.006_60)]" />
      <g fill="none" stroke="oklch(0.735 0.175 44)" strokeWidth="3.2" strokeLinecap="round">
        <path d="M10.5 24C7 18.500 7.200 12 12 7.500" />
        <path d="M16 24.500c-1.800-5.800-1.200-11.800 3-17" />
        <path d="M21.500 24.500c-.4-4.600.6-9.300 3.500-13.500" />
      </g>
    </svg>
  )
}
