import { createFileRoute } from '@tanstack/react-router'
import { ApiKeysPage } from '@/features/api-keys'

export const Route = createFileRoute('/_app/orgs/$org/api-keys')({
  component: function Page() {
    const { org } = Route.useParams()
    return <ApiKeysPage key={org} org={org} />
  },
})
