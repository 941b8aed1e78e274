import { Ago, Dot } from '@/components/ui/misc'
import type { Tone } from '@/lib/states'
import type { EventItem } from '@/lib/types'

function tone(kind: string): Tone {
  const last = kind.split('.').at(-1) ?? kind
  if (/fail|crash|unreach|oom|lost/.test(last)) return 'bad'
  if (/running|ready|healthy/.test(last)) return 'ok'
  if (/restart|queue|retry|warn/.test(last)) return 'warn'
  if (/start|creat|claim|place|releas|updat/.test(last)) return 'info'
  return 'idle'
}

export function EventRow({ event, where }: { event: EventItem; where?: React.ReactNode }) {
  return (
    <li className="flex items-baseline gap-3 py-1.5 text-sm">
      <Dot tone={tone(event.kind)} className="translate-y-[-1px]" />
      <span className="min-w-0 flex-1">
        <span className="break-words text-ink-2">{event.message}</span>
        {where}
        <code className="ml-2 font-mono text-2xs text-muted max-sm:hidden">{event.kind}</code>
      </span>
      <Ago at={event.at} className="shrink-0 text-xs text-muted tabular" />
    </li>
  )
}
