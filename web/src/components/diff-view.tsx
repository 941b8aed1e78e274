import { cn } from '@/lib/cn'
import type { Change } from '@/lib/types'

function label(field: string): { kind: string; name: string } {
  const dot = field.indexOf('.')
  return dot < 0 ? { kind: field, name: '' } : { kind: field.slice(0, dot), name: field.slice(dot + 1) }
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
