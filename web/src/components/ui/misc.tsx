import { Check, Copy } from 'lucide-react'
import { type ComponentProps, type ReactNode, useEffect, useRef, useState } from 'react'
import { cn } from '@/lib/cn'
import { ago, dateTime } from '@/lib/format'
import { stateLook, type Tone } from '@/lib/states'
import { Button } from './button'
import { toast } from './toast'

const dots: Record<Tone, string> = { ok: 'bg-ok', info: 'bg-info', warn: 'bg-warn', bad: 'bg-bad', idle: 'bg-muted/60' }
const badges: Record<Tone | 'accent', string> = {
  ok: 'bg-ok-soft text-ok-ink',
  info: 'bg-info-soft text-info-ink',
  warn: 'bg-warn-soft text-warn-ink',
  bad: 'bg-bad-soft text-bad-ink',
  idle: 'bg-hover text-muted',
  accent: 'bg-accent-soft text-accent-ink',
}

export function Badge({ tone = 'idle', className, children }: { tone?: Tone | 'accent'; className?: string; children: ReactNode }) {
  return <span className={cn('inline-flex h-5 shrink-0 items-center gap-1 rounded-md px-1.5 text-2xs font-medium whitespace-nowrap', badges[tone], className)}>{children}</span>
}

export function Dot({ tone, busy, className }: { tone: Tone; busy?: boolean; className?: string }) {
  return <span aria-hidden="true" className={cn('inline-block shrink-0 rounded-full', !className?.includes('size-') && 'size-2', dots[tone], busy && 'animate-breathe', className)} />
}

export function StateLabel({ state, className }: { state: string; className?: string }) {
  const look = stateLook(state)
  return (
    <span className={cn('inline-flex items-center gap-2 whitespace-nowrap', className)}>
      <Dot tone={look.tone} busy={look.busy} />
      {look.label}
    </span>
  )
}

export function PlacementBadge({ placement }: { placement: string }) {
  const tone = placement === 'warm' ? 'accent' : placement === 'cold' ? 'info' : placement === 'queued' ? 'warn' : 'idle'
  return <Badge tone={tone}>{placement}</Badge>
}

export function Kbd({ children, className }: { children: ReactNode; className?: string }) {
  return (
    <kbd className={cn('inline-flex h-5 min-w-5 items-center justify-center rounded-[5px] border border-line-strong/70 bg-sunken px-1 font-sans text-2xs text-muted', className)}>{children}</kbd>
  )
}

export function Skeleton({ className }: { className?: string }) {
  return <span aria-hidden="true" className={cn('block animate-breathe bg-hover', !className?.includes('rounded') && 'rounded-md', className)} />
}

/** `5 min. ago`, kept up to date; the full local and UTC time on hover. */
export function Ago({ at, className }: { at: string; className?: string }) {
  const [now, setNow] = useState(() => Date.now())
  const then = Date.parse(at)
  useEffect(() => {
    const young = Math.abs(Date.now() - then) < 90_000
    const timer = setInterval(() => setNow(Date.now()), young ? 5_000 : 30_000)
    return () => clearInterval(timer)
  }, [then])
  if (Number.isNaN(then)) return null
  return (
    <time dateTime={at} title={`${dateTime(at)} local, ${new Date(then).toISOString()}`} className={className}>
      {/* A server's clock a little ahead of ours is no future. */}
      {ago(then, then - now < 60_000 ? Math.max(now, then) : now)}
    </time>
  )
}

export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    toast.bad('Could not copy', 'The browser does not allow it here. Select the text instead.')
    return false
  }
}

export function CopyButton({ text, label = 'Copy', className, size = 'icon-sm' }: { text: string; label?: string; className?: string; size?: 'icon-sm' | 'sm' }) {
  const [done, setDone] = useState(false)
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined)
  useEffect(() => () => clearTimeout(timer.current), [])
  return (
    <Button
      variant={size === 'sm' ? 'secondary' : 'ghost'}
      size={size}
      aria-label={done ? 'Copied' : label}
      title={label}
      className={className}
      onClick={async () => {
        if (!(await copyText(text))) return
        setDone(true)
        clearTimeout(timer.current)
        timer.current = setTimeout(() => setDone(false), 1600)
      }}
    >
      {done ? <Check className="text-ok-ink" aria-hidden="true" /> : <Copy aria-hidden="true" />}
      {size === 'sm' && (done ? 'Copied' : 'Copy')}
    </Button>
  )
}

/** A command to run elsewhere. */
export function CodeBlock({ code, label, className }: { code: string; label: string; className?: string }) {
  return (
    <div className={cn('group relative rounded-lg border border-line bg-sunken', className)}>
      <pre className="py-2.5 pr-11 pl-3 font-mono text-xs leading-5 break-words whitespace-pre-wrap text-ink-2">
        {code}
      </pre>
      <CopyButton text={code} label={`Copy ${label}`} className="absolute! top-1.5 right-1.5 bg-sunken" />
    </div>
  )
}

export function Card({ className, ...props }: ComponentProps<'section'>) {
  return <section className={cn('card', className)} {...props} />
}

export function CardTitle({ children, aside, className }: { children: ReactNode; aside?: ReactNode; className?: string }) {
  return (
    <div className={cn('flex min-h-11 items-center justify-between gap-3 border-b border-line px-4 py-2', className)}>
      <h2 className="text-sm font-semibold">{children}</h2>
      {aside}
    </div>
  )
}

export function EmptyState(props: { icon?: ReactNode; title: string; children?: ReactNode; action?: ReactNode }) {
  return (
    <div className="flex flex-col items-center px-6 py-14 text-center max-sm:px-4">
      {props.icon && <div className="mb-4 flex size-11 items-center justify-center rounded-xl border border-line bg-sunken text-muted [&_svg]:size-5">{props.icon}</div>}
      <h2 className="text-base font-semibold">{props.title}</h2>
      {props.children && <div className="mt-1.5 w-full max-w-lg text-sm text-muted">{props.children}</div>}
      {props.action && <div className="mt-5 flex flex-wrap justify-center gap-2">{props.action}</div>}
    </div>
  )
}

export function PageHeader(props: { title: ReactNode; description?: ReactNode; actions?: ReactNode }) {
  return (
    <header className="mb-6">
      <div className="flex min-h-8 items-center justify-between gap-4 pointer-coarse:min-h-10">
        <h1 tabIndex={-1} className="min-w-0 text-xl font-semibold">
          {props.title}
        </h1>
        {props.actions && <div className="flex shrink-0 items-center gap-2">{props.actions}</div>}
      </div>
      {props.description && <div className="mt-0.5 max-w-2xl text-sm text-muted">{props.description}</div>}
    </header>
  )
}
