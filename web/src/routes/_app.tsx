import { createFileRoute, redirect } from '@tanstack/react-router'
import { Shell } from '@/components/shell'
import { ApiError } from '@/lib/problem'
import { meQuery } from '@/lib/queries'

export const Route = createFileRoute('/_app')({
  // Part of the first page: a file of its own would only cost a request.
  codeSplitGroupings: [],
  beforeLoad: async ({ context, location }) => {
    await context.queryClient.ensureQueryData(meQuery).catch((error: unknown) => {
      if (error instanceof ApiError && error.status === 401) throw redirect({ to: '/sign-in', search: { next: location.href } })
      throw error
    })
  },
  component: Shell,
})
