import { createFileRoute } from '@tanstack/react-router'
import { DeployPage } from '@/features/deploy'
import { templatesQuery, tiersQuery, workloadsQuery } from '@/lib/queries'

export const Route = createFileRoute('/_app/orgs/$org/deploy')({
  validateSearch: (search: Record<string, unknown>): { first?: boolean; template?: string } => ({
    ...(search.first === true ? { first: true } : {}),
    ...(typeof search.template === 'string' ? { template: search.template } : {}),
  }),
  loader: ({ context, params }) => {
    void context.queryClient.prefetchQuery(templatesQuery)
    void context.queryClient.prefetchQuery(tiersQuery)
    void context.queryClient.prefetchQuery(workloadsQuery(params.org))
  },
  component: function Deploy() {
    const { org } = Route.useParams()
    const search = Route.useSearch()
    return <DeployPage key={org} org={org} first={search.first ?? false} initialTemplate={search.template} />
  },
})
