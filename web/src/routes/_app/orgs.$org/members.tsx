import { createFileRoute } from '@tanstack/react-router'
import { MembersPage } from '@/features/members'

export const Route = createFileRoute('/_app/orgs/$org/members')({
  component: function Page() {
    const { org } = Route.useParams()
    return <MembersPage key={org} org={org} />
  },
})
