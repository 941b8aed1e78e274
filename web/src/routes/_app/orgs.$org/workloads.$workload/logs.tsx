import { createFileRoute } from '@tanstack/react-router'
import { LogsTab } from '@/features/logs'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload/logs')({
  component: function Tab() {
    const { org, workload } = Route.useParams()
    return <LogsTab org={org} name={workload} />
  },
})
