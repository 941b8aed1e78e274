import { createFileRoute } from '@tanstack/react-router'
import { OverviewTab } from '@/features/overview'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload/')({
  component: function Tab() {
    const { org, workload } = Route.useParams()
    return <OverviewTab org={org} name={workload} />
  },
})
