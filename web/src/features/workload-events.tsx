import { useQuery } from '@tanstack/react-query'
import { History } from 'lucide-react'
import { Card, EmptyState, Skeleton } from '@/components/ui/misc'
import { ErrorState } from '@/components/ui/problem'
import { workloadEventsQuery } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import { EventList } from './event-list'

export function EventsTab({ org, name }: { org: string; name: string }) {
  useTitle('Events', name)
  const events = useQuery(workloadEventsQuery(org, name))
  return (
    <Card>
      <h2 className="sr-only">Events</h2>
      {events.isPending ? (
        <div className="space-y-4 p-4">
          {[0, 1, 2, 3, 4, 5].map((i) => (
            <Skeleton key={i} className="h-4" />
          ))}
        </div>
      ) : events.isError && !events.data ? (
        <ErrorState error={events.error} onRetry={() => void events.refetch()} />
      ) : events.data?.length === 0 ? (
        <EmptyState icon={<History />} title="No events yet">
          Starts, stops, failures and changes of this workload appear here as they happen.
        </EmptyState>
      ) : (
        <EventList events={events.data ?? []} />
      )}
    </Card>
  )
}
