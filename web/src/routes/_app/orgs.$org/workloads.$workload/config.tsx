import { createFileRoute } from '@tanstack/react-router'
import { ConfigTab } from '@/features/config'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload/config')({
  component: function Tab() {
    const { org, workload } = Route.useParams()
    return <ConfigTab org={org} name={workload} />
  },
})
