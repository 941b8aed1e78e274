import { useQuery } from '@tanstack/react-query'
import { Link } from '@tanstack/react-router'
import { ChevronRight, Lightbulb } from 'lucide-react'
import type { ReactNode } from 'react'
import { Waterfall } from '@/components/waterfall'
import { Button, buttonStyles } from '@/components/ui/button'
import { Ago, Card, CardTitle, CopyButton, Dot, PlacementBadge, Skeleton } from '@/components/ui/misc'
import { stripAnsi } from '@/lib/ansi'
import { cn } from '@/lib/cn'
import { duration, mib, plural, roughly, shortDigest } from '@/lib/format'
import { tiersQuery, workloadEventsQuery, workloadQuery } from '@/lib/queries'
import { hasProcess, logSource, stateLook, type Tone } from '@/lib/states'
import { startSteps } from '@/lib/steps'
import { useTitle } from '@/lib/title'
import type { Workload } from '@/lib/types'
import { EventRow } from './event-row'
import { LogPreview } from './log-preview'
import { useWorkloadActions } from './workload-actions'

export function OverviewTab({ org, name }: { org: string; name: string }) {
  useTitle(name)
  const { data: w } = useQuery(workloadQuery(org, name))
  if (!w)
    return (
      <div className="grid gap-4 lg:grid-cols-[minmax(0,1fr)_20rem]">
        <div className="space-y-4">
          <Skeleton className="h-32 rounded-xl" />
          <Skeleton className="h-56 rounded-xl" />
        </div>
        <Skeleton className="h-88 rounded-xl" />
      </div>
    )
  return (
    <div className="grid grid-cols-[minmax(0,1fr)] items-start gap-4 lg:grid-cols-[minmax(0,1fr)_20rem]">
      <div className="min-w-0 space-y-4">
        <StateCard org={org} workload={w} />
        {w.instance && w.instance.steps.length > 0 && (
          <Card>
            <CardTitle
              aside={
                <span className="flex items-center gap-2">
                  <PlacementBadge placement={w.instance.placement} />
                  {w.instance.total_ms !== null && <span className="font-mono text-xs text-ink-2 tabular">{duration(w.instance.total_ms)}</span>}
                </span>
              }
            >
              How it started
            </CardTitle>
            <Waterfall steps={startSteps(w.instance)} placement={w.instance.placement} className="p-4" />
          </Card>
        )}
        <RecentEvents org={org} name={name} />
      </div>
      <Facts org={org} workload={w} />
    </div>
  )
}

const sentences: Record<string, string> = {
  queued: 'Waiting for room',
  starting: 'Starting',
  running: 'Running and answering',
  restarting: 'Restarting by itself',
  stopping: 'Stopping',
  stopped: 'Stopped',
  failed: 'It does not run',
  unreachable: 'Its host does not answer',
  deleting: 'Being deleted',
}

const rings: Record<Tone, string> = { ok: 'bg-ok-soft', info: 'bg-info-soft', warn: 'bg-warn-soft', bad: 'bg-bad-soft', idle: 'bg-hover' }

function StateCard({ org, workload: w }: { org: string; workload: Workload }) {
  const look = stateLook(w.state)
  const actions = useWorkloadActions(org, w)
  const since = w.state === 'running' ? (w.instance?.ready_at ?? w.updated_at) : w.updated_at
  const tail = (w.reason?.log_tail ?? []).map(stripAnsi)
  return (
    <Card className="overflow-hidden">
      <div className="flex items-start gap-4 p-4">
        <span aria-hidden="true" className={cn('flex size-9 shrink-0 items-center justify-center rounded-full', rings[look.tone])}>
          <Dot tone={look.tone} busy={look.busy} className="size-2.5" />
        </span>
        <div className="min-w-0 flex-1">
          <h2 className="text-base font-semibold">{sentences[w.state] ?? look.label}</h2>
          <p className="text-sm text-muted">
            Since <Ago at={since} />
            {w.instance && w.instance.restarts > 0 && ` · ${plural(w.instance.restarts, 'restart')}`}
            {w.queue && ` · place ${w.queue.position} in the queue${w.queue.estimate_ms ? `, about ${roughly(w.queue.estimate_ms)}` : ''}`}
          </p>
          {w.reason && (
            <div className="mt-3 space-y-1.5">
              <p className="text-sm text-ink">
                {w.reason.message} <code className="ml-1 font-mono text-xs text-muted">{w.reason.code}</code>
              </p>
              {w.reason.hint && (
                <p className="flex items-start gap-2 text-sm text-ink-2">
                  <Lightbulb className="mt-0.5 size-4 shrink-0 text-warn-ink" aria-hidden="true" />
                  {w.reason.hint}
                </p>
              )}
            </div>
          )}
          {(w.state === 'failed' || w.state === 'stopped') && (
            <div className="mt-3 flex flex-wrap gap-2">
              {actions.start && (
                <Button size="sm" variant="primary" busy={actions.busy === 'start'} onClick={actions.start}>
                  Start it
                </Button>
              )}
              {actions.restart && (
                <Button size="sm" variant="primary" busy={actions.busy === 'restart'} onClick={actions.restart}>
                  Try again
                </Button>
              )}
              {w.state === 'failed' && (
                <>
                  <Link to="/orgs/$org/workloads/$workload/config" params={{ org, workload: w.name }} className={buttonStyles({ size: 'sm' })}>
                    Change its config
                  </Link>
                  <Link to="/orgs/$org/workloads/$workload/logs" params={{ org, workload: w.name }} className={buttonStyles({ size: 'sm' })}>
                    Read its log
                  </Link>
                </>
              )}
            </div>
          )}
        </div>
      </div>
      {tail.length > 0 && (
        <div className="border-t border-line bg-term px-4 py-3">
          <p className="mb-1.5 text-2xs text-[oklch(0.72_0.006_60)]">Its last {plural(tail.length, 'line')}</p>
          <pre className="max-h-64 overflow-auto font-mono text-xs leading-5 text-[oklch(0.9_0.004_60)]" tabIndex={0} role="region" aria-label="Last log lines">
            {tail.join('\n')}
          </pre>
        </div>
      )}
      {tail.length === 0 && hasProcess(w) && (
        <LogPreview
          org={org}
          workload={w.name}
          instance={logSource(w)}
          lines={6}
          aside={
            <Link to="/orgs/$org/workloads/$workload/logs" params={{ org, workload: w.name }} className="rounded text-2xs text-[oklch(0.78_0.006_60)] hover:text-white">
              All of the log
            </Link>
          }
        />
      )}
    </Card>
  )
}

function Fact({ label, children }: { label: string; children: ReactNode }) {
  return (
    <div className="flex min-h-9 items-center justify-between gap-4 py-1.5 text-sm">
      <dt className="shrink-0 text-muted">{label}</dt>
      <dd className="flex min-w-0 items-center gap-1 text-right text-ink-2">{children}</dd>
    </div>
  )
}

function Facts({ org, workload: w }: { org: string; workload: Workload }) {
  const tiers = useQuery(tiersQuery)
  const tier = tiers.data?.find((t) => t.name === w.tier)
  const port = w.release.config.ports?.[0]?.port
  return (
    <Card>
      <CardTitle>Details</CardTitle>
      <dl className="px-4 py-2">
        {w.url && (
          <Fact label="Address">
            <a href={w.url} target="_blank" rel="noreferrer" className="truncate rounded font-mono text-xs underline decoration-line-strong underline-offset-4 hover:decoration-ink">
              {w.url.replace(/^https?:\/\//, '')}
            </a>
            <CopyButton text={w.url} label="Copy address" className="-mr-1.5 shrink-0" />
          </Fact>
        )}
        <Fact label={w.template ? 'Template' : 'Image'}>
          <span className="truncate">{w.template ?? w.image.ref}</span>
        </Fact>
        {w.image.digest && (
          <Fact label="Digest">
            <code className="font-mono text-xs">{shortDigest(w.image.digest)}</code>
            <CopyButton text={w.image.digest} label="Copy digest" className="-mr-1.5" />
          </Fact>
        )}
        <Fact label="Tier">
          <span className="capitalize">{w.tier}</span>
          {tier && <span className="text-muted">· {mib(tier.memory_mib)}</span>}
        </Fact>
        {port !== undefined && <Fact label="Port">{port}</Fact>}
        {w.release.config.volume && (
          <Fact label="Volume">
            <span className="truncate">
              {mib(w.release.config.volume.size_mib)} at {w.release.config.volume.path}
            </span>
          </Fact>
        )}
        <Fact label="Release">
          <Link to="/orgs/$org/workloads/$workload/releases" params={{ org, workload: w.name }} className="rounded underline decoration-line-strong underline-offset-4 hover:decoration-ink">
            {w.release.number}
          </Link>
        </Fact>
        {w.instance && (
          <Fact label="Instance">
            <code className="truncate font-mono text-xs" title={w.instance.id}>
              …{w.instance.id.slice(-8)}
            </code>
            <CopyButton text={w.instance.id} label="Copy instance id" className="-mr-1.5" />
          </Fact>
        )}
        <Fact label="Created">
          <Ago at={w.created_at} />
        </Fact>
      </dl>
    </Card>
  )
}

function RecentEvents({ org, name }: { org: string; name: string }) {
  const events = useQuery(workloadEventsQuery(org, name))
  return (
    <Card>
      <CardTitle
        aside={
          <Link to="/orgs/$org/workloads/$workload/events" params={{ org, workload: name }} className="inline-flex items-center gap-0.5 rounded text-xs text-muted hover:text-ink">
            All events
            <ChevronRight className="size-3.5" aria-hidden="true" />
          </Link>
        }
      >
        Lately
      </CardTitle>
      <ul className={cn('px-4 py-2', events.isPending && 'min-h-45')}>
        {events.isPending && [0, 1, 2, 3].map((i) => <Skeleton key={i} className="my-3 h-4 w-4/5" />)}
        {events.data?.slice(0, 5).map((event) => (
          <EventRow key={event.id} event={event} />
        ))}
        {events.data?.length === 0 && <li className="py-3 text-sm text-muted">Nothing has happened yet.</li>}
      </ul>
    </Card>
  )
}
