import type { ReactNode } from 'react'
import type { EventItem } from '@/lib/types'
import { EventRow } from './event-row'

const day = new Intl.DateTimeFormat('en-GB', { weekday: 'long', day: 'numeric', month: 'long' })

/** Events under the day they happened on, newest first. */
export function EventList({ events, where }: { events: readonly EventItem[]; where?: (event: EventItem) => ReactNode }) {
  const days: { label: string; items: EventItem[] }[] = []
  for (const event of events) {
    const label = day.format(new Date(event.at))
    const last = days.at(-1)
    if (last?.label === label) last.items.push(event)
    else days.push({ label, items: [event] })
  }
  return (
    <div className="divide-y divide-line">
      {days.map((group) => (
        <section key={group.label} className="px-4 py-3">
          <h3 className="mb-1 text-xs font-medium text-muted">{group.label}</h3>
          <ul>
            {group.items.map((event) => (
              <EventRow key={event.id} event={event} where={where?.(event)} />
            ))}
          </ul>
        </section>
      ))}
    </div>
  )
}
