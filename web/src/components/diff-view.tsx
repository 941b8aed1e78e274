import { cn } from '@/lib/cn'
import type { Change } from '@/lib/types'

function label(field: string): { kind: string; name: string } {
  const dot = field.indexOf('.')
  if (dot < 0) return { kind: field.replaceAll('_', ' '), name: '' }
  const kind = field.slice(0, dot)
  const name = field.slice(dot + 1)
  if (kind !== 'secrets') return { kind: kind.replace(/s$/, ''), name }
  // `OPENAI_API_KEY.env KEY`: the secret, and where its value goes.
  const [, secret = name, how, where] = /^([^.]+)\.(env|file) (.*)$/.exec(name) ?? []
  return { kind: 'secret', name: how && where !== secret ? `${secret} as ${how} ${where}` : secret }
}

/** What changes, field by field. Secrets appear as names and versions; that is all the server ever says. */
export function DiffView({ changes, className }: { changes: readonly Change[]; className?: string }) {
  return (
    <ul className={cn('overflow-hidden rounded-lg border border-line bg-sunken font-mono text-xs leading-5', className)}>
      {changes.map((change) => {
        const { kind, name } = label(change.field)
        return (
          <li key={change.field} className="border-b border-line px-3 py-1.5 last:border-0">
            <p className="text-muted">
              {kind}
              {name && <span className="text-ink"> {name}</span>}
            </p>
            {change.before !== null && (
              <p className="break-all text-bad-ink">
                <span aria-hidden="true" className="mr-2 select-none">−</span>
                <span className="sr-only">before: </span>
                {change.before}
              </p>
            )}
            {change.after !== null && (
              <p className="break-all text-ok-ink">
                <span aria-hidden="true" className="mr-2 select-none">+</span>
                <span className="sr-only">after: </span>
                {change.after}
              </p>
            )}
          </li>
        )
      })}
    </ul>
  )
}
