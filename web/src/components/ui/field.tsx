import { type ComponentProps, createContext, type ReactNode, useContext, useId } from 'react'
import { cn } from '@/lib/cn'

interface FieldContext {
  id: string
  describedBy: string | undefined
  invalid: boolean
}
const Context = createContext<FieldContext | null>(null)

/** A label, its control, and below it either what is wrong or a hint; the control inside takes ids and aria from here. */
export function Field(props: {
  label: ReactNode
  hint?: ReactNode
  error?: string | undefined
  aside?: ReactNode
  hideLabel?: boolean
  className?: string
  children: ReactNode
}) {
  const id = useId()
  const note = `${id}-note`
  const hasNote = Boolean(props.error ?? props.hint)
  return (
    <div className={cn('flex flex-col gap-1.5', props.className)}>
      <div className={cn('flex items-baseline justify-between gap-3', props.hideLabel && 'sr-only')}>
        <label htmlFor={id} className="text-sm font-medium text-ink">
          {props.label}
        </label>
        {props.aside}
      </div>
      <Context.Provider value={{ id, describedBy: hasNote ? note : undefined, invalid: Boolean(props.error) }}>{props.children}</Context.Provider>
      {hasNote && (
        <p id={note} className={cn('text-xs', props.error ? 'text-bad-ink' : 'text-muted')}>
          {props.error ?? props.hint}
        </p>
      )}
    </div>
  )
}

const control =
  'w-full rounded-lg border border-field/60 bg-panel text-sm text-ink shadow-raised transition-[border-color,box-shadow] duration-100 hover:border-field focus-visible:border-accent focus-visible:outline-none focus-visible:ring-3 focus-visible:ring-accent/25 disabled:opacity-60 aria-invalid:border-bad aria-invalid:ring-bad/20 dark:bg-sunken'

function useControl() {
  const field = useContext(Context)
  return field ? { id: field.id, 'aria-describedby': field.describedBy, 'aria-invalid': field.invalid || undefined } : {}
}

export function Input({ className, ...props }: ComponentProps<'input'>) {
  return <input {...useControl()} className={cn(control, 'h-8 px-2.5 pointer-coarse:h-10', className)} {...props} />
}

export function Textarea({ className, ...props }: ComponentProps<'textarea'>) {
  return <textarea {...useControl()} className={cn(control, 'min-h-24 px-2.5 py-2 leading-5', className)} {...props} />
}

/** The browser's own select: right on every screen, keyboard and screen reader, and free of charge. */
export function Select({ className, children, ...props }: ComponentProps<'select'>) {
  return (
    <span className={cn('relative inline-flex w-full', className)}>
      <select {...useControl()} className={cn(control, 'h-8 appearance-none pr-8 pl-2.5 pointer-coarse:h-10')} {...props}>
        {children}
      </select>
      <svg viewBox="0 0 16 16" className="pointer-events-none absolute top-1/2 right-2.5 size-3.5 -translate-y-1/2 text-muted" aria-hidden="true">
        <path d="m4 6 4 4 4-4" fill="none" stroke="currentColor" strokeWidth="1.5" strokeLinecap="round" strokeLinejoin="round" />
      </svg>
    </span>
  )
}
