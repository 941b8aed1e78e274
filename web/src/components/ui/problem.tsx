import { CircleAlert, WifiOff } from 'lucide-react'
import type { ReactNode } from 'react'
import { asApiError } from '@/lib/problem'
import { Button } from './button'
import { CopyButton } from './misc'

function Facts({ code, requestId }: { code: string; requestId: string | undefined }) {
  return (
    <p className="mt-2 flex flex-wrap items-center gap-x-2 gap-y-1 font-mono text-2xs text-muted">
      <span>{code}</span>
      {requestId && (
        <>
          <span aria-hidden="true">·</span>
          <span className="break-all">{requestId}</span>
          <CopyButton text={requestId} label="Copy request id" className="-my-1 size-5!" />
        </>
      )}
    </p>
  )
}

/** Something failed inside a form or a card: what, why, and the ids to quote. */
export function ProblemNote({ error, title }: { error: unknown; title?: string }) {
  const problem = asApiError(error)
  return (
    <div role="alert" className="flex gap-3 rounded-lg border border-bad/30 bg-bad-soft px-3.5 py-3">
      <CircleAlert className="mt-0.5 size-4 shrink-0 text-bad-ink" aria-hidden="true" />
      <div className="min-w-0 flex-1">
        <p className="text-sm font-medium text-bad-ink">{title ?? problem.title}</p>
        {problem.message !== (title ?? problem.title) && <p className="mt-0.5 text-sm break-words text-ink-2">{problem.message}</p>}
        {problem.hint && <p className="mt-0.5 text-sm text-ink-2">{problem.hint}</p>}
        {problem.errors.length > 0 && (
          <ul className="mt-1.5 space-y-0.5 text-sm text-ink-2">
            {problem.errors.map((e) => (
              <li key={`${e.pointer} ${e.detail}`}>
                {e.pointer && <code className="mr-1.5 font-mono text-xs text-muted">{e.pointer}</code>}
                {e.detail}
              </li>
            ))}
          </ul>
        )}
        <Facts code={problem.code} requestId={problem.requestId} />
      </div>
    </div>
  )
}

/** A whole page or panel that could not be loaded. */
export function ErrorState({ error, onRetry, action }: { error: unknown; onRetry?: () => void; action?: ReactNode }) {
  const problem = asApiError(error)
  const missing = problem.status === 404
  return (
    <div role="alert" className="flex flex-col items-center px-6 py-14 text-center">
      <div className="mb-4 flex size-11 items-center justify-center rounded-xl border border-line bg-sunken text-muted">
        {problem.status === 0 ? <WifiOff className="size-5" aria-hidden="true" /> : <CircleAlert className="size-5" aria-hidden="true" />}
      </div>
      <h2 className="text-base font-semibold">{missing ? 'Not found' : problem.title}</h2>
      <p className="mt-1.5 max-w-md text-sm text-muted">
        {missing ? 'It does not exist, or you are not a member of its org.' : problem.message}
      </p>
      {problem.hint && !missing && <p className="mt-1 max-w-md text-sm text-muted">{problem.hint}</p>}
      <Facts code={problem.code} requestId={problem.requestId} />
      <div className="mt-5 flex flex-wrap justify-center gap-2">
        {onRetry && !missing && <Button onClick={onRetry}>Try again</Button>}
        {action}
      </div>
    </div>
  )
}
