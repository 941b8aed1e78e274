import { useInfiniteQuery, useQuery } from '@tanstack/react-query'
import { Link } from '@tanstack/react-router'
import { Activity } from 'lucide-react'
import { Button } from '@/components/ui/button'
import { Card, EmptyState, PageHeader, Skeleton } from '@/components/ui/misc'
import { ErrorState } from '@/components/ui/problem'
import { orgEventsQuery, workloadsQuery } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import { EventList } from './event-list'

export function ActivityPage({ org }: { org: string }) {
  useTitle('Activity')
  const events = useInfiniteQuery(orgEventsQuery(org))
  const workloads = useQuery(workloadsQuery(org))
  const names = new Map(workloads.data?.map((w) => [w.id, w.name]))
  const items = events.data?.pages.flatMap((page) => page.items) ?? []
  return (
    <>
      <PageHeader title="Activity" description="Everything that happened in this organisation, newest first." />
      <Card>
        <h2 className="sr-only">Events</h2>
        {events.isPending ? (
          <div className="space-y-4 p-4">
            {[0, 1, 2, 3, 4, 5, 6, 7].map((i) => (
              <Skeleton key={i} className="h-4" />
            ))}
          </div>
        ) : events.isError && !events.data ? (
          <ErrorState error={events.error} onRetry={() => void events.refetch()} />
        ) : items.length === 0 ? (
          <EmptyState icon={<Activity />} title="Nothing has happened yet">
            Deploys, starts, failures and changes by people and programs appear here as they happen.
          </EmptyState>
        ) : (
          <EventList
            events={items}
            where={(event) => {
              const name = event.workload_id ? names.get(event.workload_id) : undefined
              return name ? (
                <Link to="/orgs/$org/workloads/$workload" params={{ org, workload: name }} className="ml-2 rounded text-xs text-muted underline decoration-line-strong underline-offset-4 hover:text-ink">
                  {name}
                </Link>
              ) : null
            }}
          />
        )}
      </Card>
      {events.hasNextPage && (
        <div className="mt-4 flex justify-center">
          <Button busy={events.isFetchingNextPage} onClick={() => void events.fetchNextPage()}>
            Older events
          </Button>
        </div>
      )}
    </>
  )
}
