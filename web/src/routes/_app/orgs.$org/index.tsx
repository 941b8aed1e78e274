import { createFileRoute } from '@tanstack/react-router'
import { WorkloadsPage } from '@/features/workloads'
import { templatesQuery, tiersQuery, workloadsQuery } from '@/lib/queries'

type Search = { state?: 'running' | 'stopped' | 'attention'; q?: string }

export const Route = createFileRoute('/_app/orgs/$org/')({
  // Part of the first page: a file of its own would only cost a request.
  codeSplitGroupings: [],
  validateSearch: (search: Record<string, unknown>): Search => ({
    ...(search.state === 'running' || search.state === 'stopped' || search.state === 'attention' ? { state: search.state } : {}),
    ...(typeof search.q === 'string' && search.q !== '' ? { q: search.q } : {}),
  }),
  loader: ({ context, params }) => {
    void context.queryClient.prefetchQuery(workloadsQuery(params.org))
    void context.queryClient.prefetchQuery(tiersQuery)
    void context.queryClient.prefetchQuery(templatesQuery)
  },
  component: function Home() {
    const { org } = Route.useParams()
    const search = Route.useSearch()
    const navigate = Route.useNavigate()
    return <WorkloadsPage org={org} state={search.state} q={search.q ?? ''} onFilter={(next) => void navigate({ search: next, replace: true })} />
  },
})
