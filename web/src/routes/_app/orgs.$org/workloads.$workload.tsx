import { createFileRoute, Outlet } from '@tanstack/react-router'
import { WorkloadFrame } from '@/features/workload-frame'
import { templatesQuery, workloadQuery } from '@/lib/queries'

export const Route = createFileRoute('/_app/orgs/$org/workloads/$workload')({
  loader: ({ context, params }) => {
    void context.queryClient.prefetchQuery(workloadQuery(params.org, params.workload))
    void context.queryClient.prefetchQuery(templatesQuery)
  },
  component: function WorkloadLayout() {
    const { org, workload } = Route.useParams()
    return (
      <WorkloadFrame key={`${org}/${workload}`} org={org} name={workload}>
        <Outlet />
      </WorkloadFrame>
    )
  },
})
