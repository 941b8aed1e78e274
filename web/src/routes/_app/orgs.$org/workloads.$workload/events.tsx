import { createFileRoute } from '@tanstack/react-router'
import { EventsTab } from '@/features/workload-events'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload/events')({
  component: function Tab() {
    const { org, workload } = Route.useParams()
    return <EventsTab org={org} name={workload} />
  },
})
