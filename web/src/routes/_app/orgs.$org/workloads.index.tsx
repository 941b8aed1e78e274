import { createFileRoute, redirect } from '@tanstack/react-router'

/** Where somebody comes who cuts a workload's address short. */
export const Route = createFileRoute('/_app/orgs/$org/workloads/')({
  beforeLoad: ({ params }) => {
    throw redirect({ to: '/orgs/$org', params, replace: true })
  },
})
