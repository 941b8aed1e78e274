import { createFileRoute, redirect } from '@tanstack/react-router'
import { ApiError } from '@/lib/problem'
import { meQuery } from '@/lib/queries'
import { homeOrg } from '@/lib/session'

export const Route = createFileRoute('/')({
  beforeLoad: async ({ context }) => {
    const me = await context.queryClient.ensureQueryData(meQuery).catch((error: unknown) => {
      if (error instanceof ApiError && error.status === 401) throw redirect({ to: '/sign-in' })
      throw error
    })
    const org = homeOrg(me)
    throw org ? redirect({ to: '/orgs/$org', params: { org: org.slug } }) : redirect({ to: '/account' })
  },
})
