import { cva, type VariantProps } from 'class-variance-authority'
import type { ComponentProps } from 'react'
import { cn } from '@/lib/cn'

export const buttonStyles = cva(
  'inline-flex shrink-0 items-center justify-center gap-1.5 rounded-lg font-medium whitespace-nowrap transition-[background-color,border-color,color,opacity] duration-100 select-none disabled:pointer-events-none disabled:opacity-50 aria-disabled:pointer-events-none aria-disabled:opacity-50 [&_svg]:shrink-0',
  {
    variants: {
      variant: {
        primary: 'bg-solid text-solid-ink hover:bg-solid-hover shadow-raised',
        secondary: 'border border-line-strong/70 bg-panel text-ink hover:bg-hover shadow-raised',
        ghost: 'text-ink-2 hover:bg-hover hover:text-ink',
        danger: 'bg-bad text-white hover:bg-bad-hover shadow-raised dark:bg-[oklch(0.53_0.2_22)] dark:hover:bg-[oklch(0.48_0.19_22)] bg-[oklch(0.54_0.2_22)]',
      },
      size: {
        sm: 'h-7 px-2.5 text-xs [&_svg]:size-3.5',
        md: 'h-8 px-3 text-sm [&_svg]:size-4 pointer-coarse:h-10',
        lg: 'h-10 px-4 text-base [&_svg]:size-4',
        icon: 'size-8 text-sm [&_svg]:size-4 pointer-coarse:size-10',
        'icon-sm': 'size-7 text-xs [&_svg]:size-3.5 pointer-coarse:size-9',
      },
    },
    defaultVariants: { variant: 'secondary', size: 'md' },
  },
)

export type ButtonProps = ComponentProps<'button'> & VariantProps<typeof buttonStyles> & { busy?: boolean }

export function Button({ className, variant, size, busy, disabled, children, type = 'button', ...props }: ButtonProps) {
  return (
    <button
      type={type}
      className={cn(buttonStyles({ variant, size }), className)}
      disabled={disabled}
      // A busy button keeps its focus: disabling it would throw a keyboard user back to the page's start.
      aria-disabled={busy || undefined}
      aria-busy={busy || undefined}
      {...props}
      onClick={busy ? (event) => event.preventDefault() : props.onClick}
    >
      {busy && <Spinner />}
      {children}
    </button>
  )
}

export function Spinner({ className }: { className?: string }) {
  return (
    <svg viewBox="0 0 16 16" className={cn('size-3.5 animate-spin', className)} aria-hidden="true">
      <circle cx="8" cy="8" r="6" fill="none" stroke="currentColor" strokeOpacity="0.25" strokeWidth="2" />
      <path d="M14 8a6 6 0 0 0-6-6" fill="none" stroke="currentColor" strokeWidth="2" strokeLinecap="round" />
    </svg>
  )
}
