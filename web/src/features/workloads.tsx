import { useQuery } from '@tanstack/react-query'
import { Link, useNavigate } from '@tanstack/react-router'
import { ArrowUpRight, Boxes, ChevronRight, Plus, Search } from 'lucide-react'
import { useRef } from 'react'
import { TemplateArt } from '@/components/template-art'
import { Button, buttonStyles } from '@/components/ui/button'
import { Input } from '@/components/ui/field'
import { Ago, Card, CodeBlock, Dot, EmptyState, PageHeader, PlacementBadge, Skeleton, StateLabel } from '@/components/ui/misc'
import { ErrorState } from '@/components/ui/problem'
import { cn } from '@/lib/cn'
import { deployCurl } from '@/lib/curl'
import { duration, plural, roughly } from '@/lib/format'
import { meQuery, templatesQuery, tiersQuery, workloadsQuery } from '@/lib/queries'
import { byAttention, needsAttention, stateGroup, stateLook } from '@/lib/states'
import { useTitle } from '@/lib/title'
import type { Workload } from '@/lib/types'
import { useWorkloadActions } from './workload-actions'

type Group = 'running' | 'stopped' | 'attention'
type Filter = { state?: Group; q?: string }

export function WorkloadsPage({ org, state, q, onFilter }: { org: string; state: Group | undefined; q: string; onFilter: (filter: Filter) => void }) {
  useTitle('Workloads')
  const list = useQuery(workloadsQuery(org))
  const me = useQuery(meQuery)
  const tiers = useQuery(tiersQuery)
  const tier = tiers.data?.find((t) => t.name === me.data?.orgs.find((o) => o.slug === org)?.tier)
  const all = list.data ?? []
  const count = (group: Group) => all.filter((w) => stateGroup(w.state) === group).length
  const running = count('running')
  const needle = q.trim().toLowerCase()
  const shown = all
    .filter((w) => (state === undefined || stateGroup(w.state) === state) && (needle === '' || `${w.name} ${w.template ?? ''} ${w.image.ref} ${w.tier}`.toLowerCase().includes(needle)))
    .sort(byAttention)
  const troubled = shown.filter(needsAttention)
  const rest = shown.filter((w) => !needsAttention(w))
  const empty = list.isSuccess && all.length === 0
  const set = (next: Filter) => {
    const merged: Filter = { ...(state ? { state } : {}), ...(q ? { q } : {}), ...next }
    onFilter(Object.fromEntries(Object.entries(merged).filter(([, value]) => value)) as Filter)
  }

  return (
    <>
      <PageHeader
        title="Workloads"
        description={
          list.isSuccess ? (
            <span className="tabular">
              {running} running of {all.length}
              {tier && ` · ${tier.max_workloads} allowed on ${tier.name}`}
            </span>
          ) : (
            <Skeleton className="my-[3px] h-3.5 w-44" />
          )
        }
        actions={
          <Link to="/orgs/$org/deploy" params={{ org }} className={buttonStyles({ variant: 'primary' })}>
            <Plus aria-hidden="true" />
            Deploy
          </Link>
        }
      />
      {empty ? (
        <Card>
          <Welcome org={org} />
        </Card>
      ) : list.isError && !list.data ? (
        <Card>
          <ErrorState error={list.error} onRetry={() => void list.refetch()} />
        </Card>
      ) : (
        <>
          <div className="mb-4 flex flex-wrap items-center gap-2">
            <div className="relative w-full sm:w-64">
              <Search className="pointer-events-none absolute top-1/2 left-2.5 z-1 size-3.5 -translate-y-1/2 text-muted" aria-hidden="true" />
              <Input type="search" aria-label="Search workloads" placeholder="Search…" value={q} onChange={(event) => set({ q: event.target.value })} className="pl-8" />
            </div>
            <div role="group" aria-label="Filter by state" className="-mx-4 flex gap-1 overflow-x-auto px-4 [scrollbar-width:none] sm:mx-0 sm:px-0">
              {(
                [
                  [undefined, 'All', all.length],
                  ['attention', 'Needs attention', count('attention')],
                  ['running', 'Running', running],
                  ['stopped', 'Stopped', count('stopped')],
                ] as const
              ).map(([value, label, n]) => (
                <button
                  key={label}
                  type="button"
                  aria-pressed={state === value}
                  onClick={() => onFilter({ ...(q ? { q } : {}), ...(value ? { state: value } : {}) })}
                  className={cn(
                    'h-8 shrink-0 rounded-lg px-2.5 text-sm whitespace-nowrap transition-colors pointer-coarse:h-10',
                    state === value ? 'bg-hover font-medium text-ink' : 'text-muted hover:bg-hover/70 hover:text-ink',
                  )}
                >
                  {label} <span className="text-muted tabular">{n}</span>
                </button>
              ))}
            </div>
          </div>
          {list.isPending ? (
            <Card>
              {[0, 1, 2].map((i) => (
                <div key={i} className="flex h-16 items-center gap-4 border-b border-line px-4 last:border-0">
                  <Skeleton className="size-9 rounded-lg" />
                  <div className="flex-1 space-y-2">
                    <Skeleton className="h-3.5 w-36" />
                    <Skeleton className="h-3 w-24" />
                  </div>
                </div>
              ))}
            </Card>
          ) : shown.length === 0 ? (
            <Card>
              <EmptyState icon={<Search />} title="Nothing matches" action={<Button onClick={() => onFilter({})}>Clear the filter</Button>}>
                {plural(all.length, 'workload is', 'workloads are')} hidden by the filter.
              </EmptyState>
            </Card>
          ) : (
            <div className="space-y-6">
              {troubled.length > 0 && (
                <section aria-labelledby="attention">
                  <h2 id="attention" className="mb-2 flex items-center gap-2 text-xs font-medium text-muted">
                    Needs attention
                  </h2>
                  <ul className="space-y-2">
                    {troubled.map((w) => (
                      <Troubled key={w.id} org={org} workload={w} />
                    ))}
                  </ul>
                </section>
              )}
              {rest.length > 0 && (
                <section aria-label={troubled.length > 0 ? 'Other workloads' : 'Workloads'}>
                  {troubled.length > 0 && <h2 className="mb-2 text-xs font-medium text-muted">Everything else</h2>}
                  <Card className="overflow-hidden">
                    <ul className="divide-y divide-line">
                      {rest.map((w) => (
                        <Row key={w.id} org={org} workload={w} />
                      ))}
                    </ul>
                  </Card>
                </section>
              )}
            </div>
          )}
        </>
      )}
    </>
  )
}

function useIcon(workload: Workload): string {
  const templates = useQuery(templatesQuery)
  return templates.data?.find((t) => t.name === workload.template)?.icon ?? workload.template ?? 'image'
}

function hostOf(url: string): string {
  return url.replace(/^https?:\/\//, '').replace(/\/$/, '')
}

function Row({ org, workload: w }: { org: string; workload: Workload }) {
  const icon = useIcon(w)
  return (
    <li className="group relative flex items-center gap-4 px-4 py-3 transition-colors hover:bg-hover/50">
      <TemplateArt icon={icon} />
      <div className="min-w-0 flex-1">
        <div className="flex items-center gap-2">
          <Link to="/orgs/$org/workloads/$workload" params={{ org, workload: w.name }} className="truncate rounded text-sm font-semibold after:absolute after:inset-0 after:rounded-lg focus-visible:outline-none focus-visible:after:outline-2 focus-visible:after:-outline-offset-2 focus-visible:after:outline-accent">
            {w.name}
          </Link>
        </div>
        <p className="truncate text-xs text-muted">
          {w.template ?? w.image.ref} · <span className="capitalize">{w.tier}</span>
        </p>
      </div>
      <div className="hidden w-56 min-w-0 md:block">
        {w.url && w.state === 'running' && (
          <a href={w.url} target="_blank" rel="noreferrer" className="relative z-1 inline-flex max-w-full items-center gap-1 rounded text-xs text-muted hover:text-ink">
            <span className="truncate">{hostOf(w.url)}</span>
            <ArrowUpRight className="size-3 shrink-0" aria-hidden="true" />
            <span className="sr-only">(opens {w.name} in a new tab)</span>
          </a>
        )}
      </div>
      <div className="hidden w-32 items-center gap-2 sm:flex">
        {w.instance && w.state === 'running' && (
          <>
            <PlacementBadge placement={w.instance.placement} />
            {w.instance.total_ms !== null && <span className="font-mono text-xs text-muted tabular">{duration(w.instance.total_ms)}</span>}
          </>
        )}
      </div>
      <div className="w-27 shrink-0 text-sm">
        <StateLabel state={w.state} />
        <p className="pl-4 text-xs text-muted">
          <Ago at={w.updated_at} />
        </p>
      </div>
      <ChevronRight className="size-4 shrink-0 text-muted opacity-50 max-sm:hidden" aria-hidden="true" />
    </li>
  )
}

function Troubled({ org, workload: w }: { org: string; workload: Workload }) {
  const look = stateLook(w.state)
  const actions = useWorkloadActions(org, w)
  return (
    <li className={cn('card relative flex flex-wrap items-start gap-x-4 gap-y-3 border-l-3 px-4 py-3.5', look.tone === 'bad' ? 'border-l-bad' : 'border-l-warn')}>
      <div className="min-w-0 flex-1 basis-64">
        <p className="flex flex-wrap items-center gap-x-2.5 gap-y-0.5">
          <Link to="/orgs/$org/workloads/$workload" params={{ org, workload: w.name }} className="rounded text-sm font-semibold underline-offset-4 hover:underline">
            {w.name}
          </Link>
          <span className="inline-flex items-center gap-1.5 text-xs text-muted">
            <Dot tone={look.tone} busy={look.busy} /> {look.label} <Ago at={w.updated_at} />
          </span>
        </p>
        <p className="mt-1 text-sm text-ink-2">
          {w.reason?.message ?? (w.queue ? `Place ${w.queue.position} in the queue${w.queue.estimate_ms ? `, about ${roughly(w.queue.estimate_ms)}` : ''}.` : 'No reason was given.')}
        </p>
        {w.reason?.hint && <p className="text-sm text-muted">{w.reason.hint}</p>}
      </div>
      <div className="flex gap-2">
        <Link to="/orgs/$org/workloads/$workload/logs" params={{ org, workload: w.name }} className={buttonStyles({ size: 'sm' })}>
          Logs<span className="sr-only"> of {w.name}</span>
        </Link>
        {actions.restart && (
          <Button size="sm" busy={actions.busy === 'restart'} onClick={actions.restart}>
            Restart<span className="sr-only"> {w.name}</span>
          </Button>
        )}
      </div>
    </li>
  )
}

function Welcome({ org }: { org: string }) {
  const navigate = useNavigate()
  const button = useRef<HTMLButtonElement>(null)
  return (
    <EmptyState
      icon={<Boxes />}
      title="Nothing runs here yet"
      action={
        <Button ref={button} variant="primary" size="lg" onClick={() => void navigate({ to: '/orgs/$org/deploy', params: { org }, search: { first: true } })}>
          Deploy your first agent
        </Button>
      }
    >
      <p>A workload is an isolated container with an address of its own. Start with Hello, bring OpenClaw, or any image.</p>
      <div className="mt-5 text-left">
        <CodeBlock code={deployCurl(location.origin, org, { template: 'hello' })} label="deploy command" />
      </div>
    </EmptyState>
  )
}
