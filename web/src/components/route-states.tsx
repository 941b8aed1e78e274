import { Link, useRouter } from '@tanstack/react-router'
import { ApiError } from '@/lib/problem'
import { buttonStyles } from './ui/button'
import { EmptyState } from './ui/misc'
import { ErrorState } from './ui/problem'

export function RouteError({ error, reset }: { error: unknown; reset?: () => void }) {
  const router = useRouter()
  // What is no answer of the API is a fault of this page; it is named as such and not as a broken network.
  const shown =
    error instanceof ApiError
      ? error
      : new ApiError({ status: 500, code: 'console_error', title: 'This page broke', detail: error instanceof Error ? error.message : String(error) })
  return (
    <main className="mx-auto w-full max-w-3xl px-4 py-10">
      <h1 className="sr-only">Error</h1>
      <ErrorState
        error={shown}
        onRetry={() => {
          reset?.()
          void router.invalidate()
        }}
      />
    </main>
  )
}

export function RouteMissing() {
  return (
    <main className="mx-auto w-full max-w-3xl px-4 py-10">
      <h1 className="sr-only">Not found</h1>
      <EmptyState
        title="There is no such page"
        action={
          <Link to="/" className={buttonStyles()}>
            Go to workloads
          </Link>
        }
      >
        The address may be old, or mistyped.
      </EmptyState>
    </main>
  )
}
