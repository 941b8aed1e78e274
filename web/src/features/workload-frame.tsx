import { useQuery, useQueryClient } from '@tanstack/react-query'
import { Link, useLocation, useNavigate } from '@tanstack/react-router'
import { ArrowUpRight, ChevronRight, Ellipsis, Play, RotateCw, Square, Trash2 } from 'lucide-react'
import { type ReactNode, useEffect, useRef, useState } from 'react'
import { TemplateArt } from '@/components/template-art'
import { Button, buttonStyles } from '@/components/ui/button'
import { Confirm } from '@/components/ui/confirm'
import { Menu } from '@/components/ui/menu'
import { copyText, Skeleton, StateLabel } from '@/components/ui/misc'
import { ErrorState } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { api } from '@/lib/api'
import { cn } from '@/lib/cn'
import { keys, templatesQuery, workloadQuery } from '@/lib/queries'
import { useShortcuts } from '@/lib/shortcuts'
import { stateLook } from '@/lib/states'
import type { Workload } from '@/lib/types'
import { useWorkloadActions } from './workload-actions'

const base = '/orgs/$org/workloads/$workload'
const tabs = [
  { to: base, label: 'Overview' },
  { to: `${base}/logs`, label: 'Logs' },
  { to: `${base}/terminal`, label: 'Terminal' },
  { to: `${base}/events`, label: 'Events' },
  { to: `${base}/config`, label: 'Config & secrets' },
  { to: `${base}/releases`, label: 'Releases' },
] as const

/** Name, state, actions and tabs of a workload, around whichever tab is open. */
export function WorkloadFrame({ org, name, children }: { org: string; name: string; children: ReactNode }) {
  const query = useQuery(workloadQuery(org, name))
  const templates = useQuery(templatesQuery)
  const navigate = useNavigate()
  const params = { org, workload: name }
  const bar = useRef<HTMLElement>(null)
  const path = useLocation({ select: (at) => at.pathname })
  useEffect(() => {
    // On a narrow screen the open tab may lie outside the bar.
    const current = bar.current?.querySelector<HTMLElement>('[aria-current=page]')
    if (bar.current && current) bar.current.scrollLeft = current.offsetLeft - (bar.current.clientWidth - current.offsetWidth) / 2
  }, [path])
  useShortcuts(Object.fromEntries(tabs.map((tab, index) => [String(index + 1), () => void navigate({ to: tab.to, params })])))
  if (query.isError && !query.data)
    return (
      <>
        <h1 className="sr-only">{name}</h1>
        <ErrorState
          error={query.error}
          onRetry={() => void query.refetch()}
          action={
            <Link to="/orgs/$org" params={{ org }} className={buttonStyles()}>
              All workloads
            </Link>
          }
        />
      </>
    )
  const w = query.data
  const icon = templates.data?.find((t) => t.name === w?.template)?.icon ?? w?.template ?? 'image'
  return (
    <>
      <header className="mb-5">
        <nav aria-label="Breadcrumb" className="mb-3 flex items-center gap-1 text-xs text-muted">
          <Link to="/orgs/$org" params={{ org }} className="rounded hover:text-ink">
            Workloads
          </Link>
          <ChevronRight className="size-3" aria-hidden="true" />
          <span className="truncate text-ink-2" aria-current="page">
            {name}
          </span>
        </nav>
        <div className="flex flex-wrap items-center gap-x-4 gap-y-3">
          <TemplateArt icon={icon} size="lg" />
          <div className="min-w-0 flex-1 basis-52">
            <h1 tabIndex={-1} className="truncate text-xl leading-7 font-semibold">
              {name}
            </h1>
            {w ? (
              <p className="flex h-5 min-w-0 items-center gap-2 text-sm text-muted">
                <span data-testid="state" data-state={w.state}>
                  <StateLabel state={w.state} className="text-ink-2" />
                </span>
                {w.url && (
                  <>
                    <span aria-hidden="true" className="text-line-strong">/</span>
                    <a href={w.url} target="_blank" rel="noreferrer" className="inline-flex min-w-0 items-center gap-0.5 rounded hover:text-ink">
                      <span className="truncate">{w.url.replace(/^https?:\/\//, '')}</span>
                      <ArrowUpRight className="size-3.5 shrink-0" aria-hidden="true" />
                    </a>
                  </>
                )}
              </p>
            ) : (
              <div className="flex h-5 items-center">
                <Skeleton className="h-3.5 w-52" />
              </div>
            )}
          </div>
          <div className="flex h-8 items-center gap-2 pointer-coarse:h-10">{w && <Actions org={org} workload={w} />}</div>
        </div>
      </header>
      <nav ref={bar} aria-label="Workload" className="relative -mx-4 mb-6 overflow-x-auto border-b border-line px-4 [scrollbar-width:none] sm:mx-0 sm:px-0">
        <ul className="flex gap-1">
          {tabs.map((tab) => (
            <li key={tab.to}>
              <Link
                to={tab.to}
                params={params}
                activeOptions={{ exact: true, includeSearch: false }}
                activeProps={{ className: 'border-ink! text-ink! font-medium' }}
                data-tab={tab.label}
                className={cn('-mb-px flex h-9 items-center rounded-t border-b-2 border-transparent px-2.5 text-sm whitespace-nowrap text-muted transition-colors hover:text-ink focus-visible:-outline-offset-2 pointer-coarse:h-11')}
              >
                {tab.label}
              </Link>
            </li>
          ))}
        </ul>
      </nav>
      {children}
    </>
  )
}

function Actions({ org, workload: w }: { org: string; workload: Workload }) {
  const actions = useWorkloadActions(org, w)
  const [deleting, setDeleting] = useState(false)
  const client = useQueryClient()
  const navigate = useNavigate()
  const look = stateLook(w.state)
  return (
    <>
      {actions.restart && (
        <Button busy={actions.busy === 'restart'} onClick={actions.restart}>
          {actions.busy !== 'restart' && <RotateCw aria-hidden="true" />}
          Restart
        </Button>
      )}
      {actions.stop && (
        <Button busy={actions.busy === 'stop'} onClick={actions.stop}>
          {actions.busy !== 'stop' && <Square aria-hidden="true" />}
          Stop
        </Button>
      )}
      {actions.start && (
        <Button variant="primary" busy={actions.busy === 'start' || (look.busy && w.state === 'starting')} onClick={actions.start}>
          {actions.busy !== 'start' && <Play aria-hidden="true" />}
          Start
        </Button>
      )}
      <Menu
        label={`More actions for ${w.name}`}
        className={buttonStyles({ size: 'icon' })}
        entries={[
          { kind: 'item', label: 'Copy id', onSelect: () => void copyText(w.id).then((ok) => ok && toast.ok('Id copied', w.id)) },
          ...(w.url ? [{ kind: 'item' as const, label: 'Copy address', onSelect: () => void copyText(w.url ?? '').then((ok) => ok && toast.ok('Address copied')) }] : []),
          { kind: 'separator' },
          { kind: 'item', label: 'Delete…', icon: <Trash2 aria-hidden="true" />, danger: true, onSelect: () => setDeleting(true) },
        ]}
      >
        <Ellipsis aria-hidden="true" />
      </Menu>
      <Confirm
        open={deleting}
        onOpenChange={setDeleting}
        title={`Delete ${w.name}?`}
        action="Delete workload"
        phrase={w.name}
        onConfirm={async () => {
          await api.deleteWorkload(org, w.name)
          await navigate({ to: '/orgs/$org', params: { org } })
          client.removeQueries({ queryKey: keys.workload(org, w.name) })
          await client.invalidateQueries({ queryKey: keys.workloads(org) })
          toast.ok(`${w.name} deleted`)
        }}
      >
        Its container stops, and its address, its releases and its state volume go with it. This cannot be undone. Secrets stay: they belong to the organisation.
      </Confirm>
    </>
  )
}
