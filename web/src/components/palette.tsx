import { Dialog } from '@base-ui/react/dialog'
import { useQuery, useQueryClient } from '@tanstack/react-query'
import { useNavigate } from '@tanstack/react-router'
import { Command } from 'cmdk'
import { Activity, Boxes, Building, CircleUser, Keyboard, KeyRound, LockKeyhole, LogOut, Monitor, Moon, Play, Plus, RotateCw, ScrollText, Search, Square, SquareTerminal, Sun, Users } from 'lucide-react'
import type { ReactNode } from 'react'
import { api, type Action } from '@/lib/api'
import { keys, workloadsQuery } from '@/lib/queries'
import { readPref, writePref } from '@/lib/storage'
import { canRestart, canStart, canStop, stateLook } from '@/lib/states'
import { setTheme } from '@/lib/theme'
import type { Me, Org } from '@/lib/types'
import { Dot, Kbd } from './ui/misc'
import { toast } from './ui/toast'

const RECENT = 6

function recentIds(): string[] {
  try {
    const list: unknown = JSON.parse(readPref('recent') ?? '[]')
    return Array.isArray(list) ? list.filter((id): id is string => typeof id === 'string').slice(0, RECENT) : []
  } catch {
    return []
  }
}

interface Entry {
  id: string
  group: string
  label: string
  words?: string
  icon: ReactNode
  keys?: string[]
  run: () => void
}

export default function Palette(props: {
  open: boolean
  onOpenChange: (open: boolean) => void
  me: Me
  org: Org | undefined
  onShortcuts: () => void
  onSignOut: () => void
}) {
  return (
    <Dialog.Root open={props.open} onOpenChange={props.onOpenChange}>
      <Dialog.Portal>
        <Dialog.Backdrop className="backdrop fixed inset-0 z-40 bg-black/40 transition-opacity duration-100 data-ending-style:opacity-0 data-starting-style:opacity-0 dark:bg-black/60" />
        <Dialog.Popup className="fixed top-[12vh] left-1/2 z-50 w-[calc(100vw-1.5rem)] max-w-xl -translate-x-1/2 overflow-hidden rounded-2xl border border-line bg-panel shadow-float transition-[opacity,scale] duration-100 data-ending-style:scale-[0.98] data-ending-style:opacity-0 data-starting-style:scale-[0.98] data-starting-style:opacity-0">
          <Dialog.Title className="sr-only">Search and commands</Dialog.Title>
          <Content {...props} />
        </Dialog.Popup>
      </Dialog.Portal>
    </Dialog.Root>
  )
}

function Content({ onOpenChange, me, org, onShortcuts, onSignOut }: Parameters<typeof Palette>[0]) {
  const navigate = useNavigate()
  const client = useQueryClient()
  const workloads = useQuery({ ...workloadsQuery(org?.slug ?? ''), enabled: org !== undefined })
  const slug = org?.slug

  const entries: Entry[] = []
  if (slug) {
    const params = { org: slug }
    entries.push(
      { id: 'deploy', group: 'Actions', label: 'Deploy a workload', words: 'new create', icon: <Plus />, keys: ['N'], run: () => void navigate({ to: '/orgs/$org/deploy', params }) },
      { id: 'go-workloads', group: 'Go to', label: 'Workloads', words: 'home list', icon: <Boxes />, keys: ['G', 'W'], run: () => void navigate({ to: '/orgs/$org', params }) },
      { id: 'go-secrets', group: 'Go to', label: 'Secrets', icon: <LockKeyhole />, keys: ['G', 'S'], run: () => void navigate({ to: '/orgs/$org/secrets', params }) },
      { id: 'go-activity', group: 'Go to', label: 'Activity', words: 'events audit', icon: <Activity />, keys: ['G', 'A'], run: () => void navigate({ to: '/orgs/$org/activity', params }) },
      { id: 'go-members', group: 'Go to', label: 'Members', words: 'invite team people', icon: <Users />, keys: ['G', 'M'], run: () => void navigate({ to: '/orgs/$org/members', params }) },
      { id: 'go-keys', group: 'Go to', label: 'API keys', words: 'token', icon: <KeyRound />, keys: ['G', 'K'], run: () => void navigate({ to: '/orgs/$org/api-keys', params }) },
    )
    for (const w of workloads.data ?? []) {
      const at = { org: slug, workload: w.name }
      const act = (action: Action, done: string) => () =>
        void api.act(slug, w.name, action).then(
          (next) => {
            client.setQueryData(keys.workload(slug, w.name), next)
            void client.invalidateQueries({ queryKey: keys.workloads(slug) })
            toast.ok(done)
          },
          (error: unknown) => toast.error(`Could not ${action} ${w.name}`, error),
        )
      entries.push(
        { id: `w ${w.name}`, group: 'Workloads', label: w.name, words: `${w.template ?? ''} ${w.state}`, icon: <Dot tone={stateLook(w.state).tone} className="mx-1" />, run: () => void navigate({ to: '/orgs/$org/workloads/$workload', params: at }) },
        { id: `l ${w.name}`, group: 'Workloads', label: `${w.name}: logs`, icon: <ScrollText />, run: () => void navigate({ to: '/orgs/$org/workloads/$workload/logs', params: at }) },
        { id: `t ${w.name}`, group: 'Workloads', label: `${w.name}: terminal`, words: 'shell', icon: <SquareTerminal />, run: () => void navigate({ to: '/orgs/$org/workloads/$workload/terminal', params: at }) },
      )
      if (canRestart(w)) entries.push({ id: `r ${w.name}`, group: 'Actions', label: `Restart ${w.name}`, icon: <RotateCw />, run: act('restart', `Restarting ${w.name}`) })
      if (canStop(w)) entries.push({ id: `s ${w.name}`, group: 'Actions', label: `Stop ${w.name}`, icon: <Square />, run: act('stop', `Stopping ${w.name}`) })
      if (canStart(w)) entries.push({ id: `p ${w.name}`, group: 'Actions', label: `Start ${w.name}`, icon: <Play />, run: act('start', `Starting ${w.name}`) })
    }
  }
  for (const o of me.orgs)
    if (o.slug !== slug)
      entries.push({ id: `o ${o.slug}`, group: 'Go to', label: `Switch to ${o.name}`, words: 'organisation', icon: <Building />, run: () => void navigate({ to: '/orgs/$org', params: { org: o.slug } }) })
  entries.push(
    { id: 'go-account', group: 'Go to', label: 'Account and sessions', icon: <CircleUser />, keys: ['G', 'U'], run: () => void navigate({ to: '/account' }) },
    { id: 'theme-light', group: 'Preferences', label: 'Theme: light', icon: <Sun />, run: () => setTheme('light') },
    { id: 'theme-dark', group: 'Preferences', label: 'Theme: dark', icon: <Moon />, run: () => setTheme('dark') },
    { id: 'theme-system', group: 'Preferences', label: 'Theme: as the system', icon: <Monitor />, run: () => setTheme('system') },
    { id: 'shortcuts', group: 'Preferences', label: 'Keyboard shortcuts', icon: <Keyboard />, keys: ['?'], run: onShortcuts },
    { id: 'sign-out', group: 'Preferences', label: 'Sign out', words: 'log out', icon: <LogOut />, run: onSignOut },
  )

  const recent = recentIds()
  const recentEntries = recent.flatMap((id) => entries.find((e) => e.id === id) ?? [])
  const groups = ['Workloads', 'Actions', 'Go to', 'Preferences']
  const choose = (entry: Entry) => {
    writePref('recent', JSON.stringify([entry.id, ...recent.filter((id) => id !== entry.id)].slice(0, RECENT)))
    onOpenChange(false)
    entry.run()
  }
  const row = (entry: Entry, prefix: string) => (
    <Command.Item
      key={prefix + entry.id}
      value={`${prefix}${entry.label} ${entry.words ?? ''} ${entry.id}`}
      onSelect={() => choose(entry)}
      className="flex h-9 cursor-default items-center gap-3 rounded-lg px-2.5 text-sm text-ink-2 select-none data-[selected=true]:bg-hover data-[selected=true]:text-ink data-[selected=true]:ring-1 data-[selected=true]:ring-line-strong/60 data-[selected=true]:ring-inset [&_svg]:size-4 [&_svg]:shrink-0 [&_svg]:text-muted pointer-coarse:h-11"
    >
      <span aria-hidden="true" className="contents">
        {entry.icon}
      </span>
      <span className="min-w-0 flex-1 truncate">{entry.label}</span>
      {entry.keys && (
        <span className="flex gap-1" aria-hidden="true">
          {entry.keys.map((key) => (
            <Kbd key={key}>{key}</Kbd>
          ))}
        </span>
      )}
    </Command.Item>
  )
  const heading = '[&_[cmdk-group-heading]]:px-2.5 [&_[cmdk-group-heading]]:pt-2.5 [&_[cmdk-group-heading]]:pb-1.5 [&_[cmdk-group-heading]]:text-xs [&_[cmdk-group-heading]]:text-muted'
  return (
    <Command label="Search and commands" loop>
      <div className="flex items-center gap-3 border-b border-line px-4">
        <Search className="size-4 shrink-0 text-muted" aria-hidden="true" />
        <Command.Input autoFocus placeholder="Search workloads, pages and commands…" className="h-12 w-full bg-transparent text-base outline-none" />
        <Kbd>Esc</Kbd>
      </div>
      <Command.List className="max-h-[min(26rem,60vh)] overflow-y-auto p-1.5">
        <Command.Empty className="py-10 text-center text-sm text-muted">Nothing of that name.</Command.Empty>
        {recentEntries.length > 0 && (
          <Command.Group heading="Recent" className={heading}>
            {recentEntries.map((entry) => row(entry, 'recent '))}
          </Command.Group>
        )}
        {groups.map((group) => {
          const list = entries.filter((e) => e.group === group)
          return (
            list.length > 0 && (
              <Command.Group key={group} heading={group} className={heading}>
                {list.map((entry) => row(entry, ''))}
              </Command.Group>
            )
          )
        })}
      </Command.List>
    </Command>
  )
}
