import { createFileRoute } from '@tanstack/react-router'
import { TerminalTab } from '@/features/terminal'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload/terminal')({
  component: function Tab() {
    const { org, workload } = Route.useParams()
    return <TerminalTab org={org} name={workload} />
  },
})
