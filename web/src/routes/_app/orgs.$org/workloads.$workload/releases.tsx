import { createFileRoute } from '@tanstack/react-router'
import { ReleasesTab } from '@/features/releases'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload/releases')({
  component: function Tab() {
    const { org, workload } = Route.useParams()
    return <ReleasesTab org={org} name={workload} />
  },
})
