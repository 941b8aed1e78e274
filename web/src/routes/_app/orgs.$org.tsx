import { useQuery } from '@tanstack/react-query'
import { createFileRoute, Outlet } from '@tanstack/react-router'
import { useEffect } from 'react'
import { RouteMissing } from '@/components/route-states'
import { meQuery } from '@/lib/queries'
import { rememberOrg } from '@/lib/session'

export const Route = createFileRoute('/_app/orgs/$org')({
  // Part of the first page: a file of its own would only cost a request.
  codeSplitGroupings: [],
  component: OrgLayout,
})

function OrgLayout() {
  const { org } = Route.useParams()
  const me = useQuery(meQuery)
  const known = me.data?.orgs.some((o) => o.slug === org) ?? false
  useEffect(() => {
    if (known) rememberOrg(org)
  }, [known, org])
  if (!known) return <RouteMissing />
  return <Outlet />
}
