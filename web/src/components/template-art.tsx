import { Container } from 'lucide-react'
import { cn } from '@/lib/cn'

/** A template's mark: its own for those we ship, a container for any image. */
export function TemplateArt({ icon, size = 'md' }: { icon: string | null | undefined; size?: 'md' | 'lg' | 'xl' }) {
  const frame = cn('flex shrink-0 items-center justify-center', { md: 'size-9 rounded-lg', lg: 'size-11 rounded-xl', xl: 'size-12 rounded-xl' }[size])
  if (icon === 'openclaw' || icon === 'claw' || icon === 'lobster')
    return (
      <span aria-hidden="true" className={cn(frame, 'bg-[oklch(0.93_0.05_25)] text-[oklch(0.55_0.2_25)] dark:bg-[oklch(0.28_0.07_22)] dark:text-[oklch(0.78_0.14_25)]')}>
        <svg viewBox="0 0 24 24" className="size-[58%]" fill="none" stroke="currentColor" strokeWidth="1.8" strokeLinecap="round" strokeLinejoin="round">
          <path d="M7.200 20.500c-.4-3.300.3-5.600 2.200-7.300" />
          <path d="M9.400 13.200C5.600 12.300 3.600 9.600 3.900 6.300c.1-1.300.7-2.300 1.500-3 .2 2.200 1.100 3.700 2.800 4.500.2-2 .9-3.500 2.400-4.600 1.900 2.200 2.500 4.600 1.700 7.100-.5 1.500-1.500 2.500-2.900 2.900Z" />
          <path d="M14.500 20.500c.3-1.900 1-3.300 2.200-4.300 1.900.300 3.400-.600 4-2.300.4-1.100.3-2.200-.2-3.100-.9 1-1.900 1.400-3.100 1.200.2-1.200 0-2.300-.7-3.200-1.800 1-2.700 2.500-2.600 4.400.1 1.200.6 2.300 2.600 3" />
        </svg>
      </span>
    )
  if (icon === 'hello' || icon === 'spark' || icon === 'wave')
    return (
      <span aria-hidden="true" className={cn(frame, 'bg-[oklch(0.945_0.055_80)] text-[oklch(0.53_0.13_60)] dark:bg-[oklch(0.29_0.05_75)] dark:text-[oklch(0.83_0.13_78)]')}>
        <svg viewBox="0 0 24 24" className="size-[56%]" fill="none" stroke="currentColor" strokeWidth="1.8" strokeLinecap="round" strokeLinejoin="round">
          <path d="M12 3c.6 4.900 2.900 7.300 8 8.500-5.100 1.200-7.400 3.600-8 8.500-.6-4.900-2.900-7.300-8-8.500 5.100-1.200 7.400-3.600 8-8.500Z" />
          <path d="M19.500 3v3M21 4.500h-3" />
        </svg>
      </span>
    )
  return (
    <span aria-hidden="true" className={cn(frame, 'bg-hover text-ink-2')}>
      <Container className="size-[54%]" strokeWidth={1.7} />
    </span>
  )
}
