import { createFileRoute } from '@tanstack/react-router'
import { SecretsPage } from '@/features/secrets'

export const Route = createFileRoute('/_app/orgs/$org/secrets')({
  component: function Page() {
    const { org } = Route.useParams()
    return <SecretsPage key={org} org={org} />
  },
})
