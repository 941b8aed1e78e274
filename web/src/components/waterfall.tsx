import { cn } from '@/lib/cn'
import { duration } from '@/lib/format'
import { waterfall } from '@/lib/steps'
import type { Step } from '@/lib/types'

/** The named steps of a deploy, one under the other, each where it lies in the whole. */
export function Waterfall({ steps, placement, className }: { steps: readonly Step[]; placement?: string; className?: string }) {
  const { bars } = waterfall(steps)
  return (
    <ol className={cn('space-y-2', className)}>
      {bars.map((bar, index) => (
        <li key={`${index} ${bar.name}`} className="grid grid-cols-[8.5rem_minmax(0,1fr)_4rem] items-center gap-3 text-sm max-sm:grid-cols-[7.5rem_minmax(0,1fr)_3.75rem]">
          <span className="truncate text-ink-2">{bar.label}</span>
          <span aria-hidden="true" className="relative h-1.5 overflow-hidden rounded-full bg-hover">
            <span
              className={cn('absolute inset-y-0 rounded-full', placement === 'cold' ? 'bg-info' : 'bg-accent')}
              style={{ left: `${Math.min(bar.left, 98.5)}%`, width: `${Math.max(bar.width, 1.5)}%` }}
            />
          </span>
          <span className="text-right font-mono text-xs text-muted tabular">{duration(bar.ms)}</span>
        </li>
      ))}
    </ol>
  )
}
