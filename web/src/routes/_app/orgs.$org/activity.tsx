import { createFileRoute } from '@tanstack/react-router'
import { ActivityPage } from '@/features/activity'

export const Route = createFileRoute('/_app/orgs/$org/activity')({
  component: function Page() {
    const { org } = Route.useParams()
    return <ActivityPage key={org} org={org} />
  },
})
