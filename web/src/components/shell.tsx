import { useQuery, useQueryClient } from '@tanstack/react-query'
import { Link, Outlet, useLocation, useNavigate, useParams } from '@tanstack/react-router'
import { Activity, Boxes, ChevronsUpDown, CircleUser, Keyboard, KeyRound, LockKeyhole, LogOut, Menu as MenuIcon, Monitor, Moon, Plus, Search, Sun, Users } from 'lucide-react'
import { lazy, type ReactNode, Suspense, useCallback, useEffect, useRef, useState } from 'react'
import { api } from '@/lib/api'
import { cn } from '@/lib/cn'
import { useOrgEvents } from '@/lib/live'
import { meQuery } from '@/lib/queries'
import { homeOrg } from '@/lib/session'
import { useShortcuts } from '@/lib/shortcuts'
import { setTheme, type ThemeChoice, useThemeChoice } from '@/lib/theme'
import type { Me, Org } from '@/lib/types'
import { ConnectionBadge } from './connection'
import { Logo } from './logo'
import { Button, buttonStyles } from './ui/button'
import { preloadOverlays } from './ui/dialog'
import { Menu } from './ui/menu'
import { Kbd } from './ui/misc'
import { toast } from './ui/toast'

const Drawer = lazy(() => import('./ui/drawer'))
const Palette = lazy(() => import('./palette'))
const ShortcutSheet = lazy(() => import('./shortcut-sheet'))
const NewOrg = lazy(() => import('@/features/new-org'))

type Overlay = 'palette' | 'shortcuts' | 'new-org' | null

/** The frame of every signed-in page: navigation, palette, shortcuts, connection. */
export function Shell() {
  const { data: me } = useQuery(meQuery)
  const params = useParams({ strict: false }) as { org?: string }
  const navigate = useNavigate()
  const [overlay, setOverlay] = useState<Overlay>(null)
  const [used, setUsed] = useState<ReadonlySet<Overlay>>(new Set())
  const open = useCallback((next: Overlay) => {
    setUsed((before) => (before.has(next) ? before : new Set([...before, next])))
    setOverlay(next)
  }, [])
  const signOut = useSignOut()
  const org = me?.orgs.find((o) => o.slug === params.org) ?? (me ? homeOrg(me) : undefined)
  const slug = org?.slug
  useOrgEvents(slug)

  const go = (to: '/orgs/$org' | '/orgs/$org/deploy' | '/orgs/$org/secrets' | '/orgs/$org/activity' | '/orgs/$org/members' | '/orgs/$org/api-keys') => () => {
    if (slug) void navigate({ to, params: { org: slug } })
  }
  useShortcuts({
    'mod+k': () => (overlay === 'palette' ? setOverlay(null) : open('palette')),
    '?': () => open('shortcuts'),
    n: go('/orgs/$org/deploy'),
    'g w': go('/orgs/$org'),
    'g s': go('/orgs/$org/secrets'),
    'g a': go('/orgs/$org/activity'),
    'g m': go('/orgs/$org/members'),
    'g k': go('/orgs/$org/api-keys'),
    'g u': () => void navigate({ to: '/account' }),
    '/': () => document.querySelector<HTMLInputElement>('main input[type=search]')?.focus(),
  })
  useEffect(preloadOverlays, [])
  if (!me) return null
  const close = (is: Overlay) => (next: boolean) => {
    if (!next && overlay === is) setOverlay(null)
  }
  const nav = <Nav me={me} org={org} open={open} signOut={signOut} />
  return (
    <div className="min-h-dvh lg:grid lg:grid-cols-[15rem_minmax(0,1fr)]">
      <a href="#main" className={cn(buttonStyles({ variant: 'primary' }), 'fixed top-2 left-2 z-50 -translate-y-20 focus:translate-y-0')}>
        Skip to content
      </a>
      <aside className="sticky top-0 hidden h-dvh flex-col border-r border-line bg-sunken lg:flex">{nav}</aside>
      <MobileBar open={open} org={org}>
        {nav}
      </MobileBar>
      <main id="main" tabIndex={-1} className="mx-auto w-full max-w-[70rem] min-w-0 px-4 pt-5 pb-16 sm:px-6 lg:px-10 lg:pt-9">
        <Outlet />
      </main>
      <Suspense>
        {used.has('palette') && <Palette open={overlay === 'palette'} onOpenChange={close('palette')} me={me} org={org} onShortcuts={() => open('shortcuts')} onSignOut={signOut} />}
        {used.has('shortcuts') && <ShortcutSheet open={overlay === 'shortcuts'} onOpenChange={close('shortcuts')} />}
        {used.has('new-org') && <NewOrg open={overlay === 'new-org'} onOpenChange={close('new-org')} />}
      </Suspense>
    </div>
  )
}

function useSignOut(): () => void {
  const client = useQueryClient()
  const navigate = useNavigate()
  return () => {
    api.signOut().then(
      () => {
        // Nothing of one account may be seen by the next one at the same browser.
        client.clear()
        void navigate({ to: '/sign-in' })
      },
      (error: unknown) => toast.error('Could not sign out', error),
    )
  }
}

function MobileBar({ children, open, org }: { children: ReactNode; open: (overlay: Overlay) => void; org: Org | undefined }) {
  const [drawer, setDrawer] = useState(false)
  const [used, setUsed] = useState(false)
  const button = useRef<HTMLButtonElement>(null)
  return (
    <header className="sticky top-0 z-20 flex h-13 items-center gap-2 border-b border-line bg-bg/90 px-2.5 backdrop-blur lg:hidden">
      <Button
        ref={button}
        variant="ghost"
        size="icon"
        aria-label="Open navigation"
        aria-haspopup="dialog"
        aria-expanded={drawer}
        onClick={() => {
          setUsed(true)
          setDrawer(true)
        }}
      >
        <MenuIcon aria-hidden="true" />
      </Button>
      {used && (
        <Suspense>
          <Drawer open={drawer} onOpenChange={setDrawer} finalFocus={button}>
            {children}
          </Drawer>
        </Suspense>
      )}
      <Link to="/" className="flex min-w-0 flex-1 items-center gap-2 rounded-md font-semibold">
        <Logo />
        <span className="truncate text-sm">{org?.name ?? 'ClawHQ'}</span>
        <span className="sr-only">, workloads</span>
      </Link>
      <Button variant="ghost" size="icon" aria-label="Search and commands" onClick={() => open('palette')}>
        <Search aria-hidden="true" />
      </Button>
    </header>
  )
}

function Nav({ me, org, open, signOut }: { me: Me; org: Org | undefined; open: (overlay: Overlay) => void; signOut: () => void }) {
  return (
    <>
      <div className="flex items-center gap-2 px-3 pt-3.5 pr-12 pb-2 lg:pr-3">
        <OrgSwitch me={me} org={org} open={open} />
      </div>
      <div className="px-3 pb-3">
        <button
          type="button"
          onClick={() => open('palette')}
          className="flex h-8 w-full items-center gap-2 rounded-lg border border-line-strong/60 bg-panel px-2.5 text-sm text-muted shadow-raised hover:border-line-strong hover:text-ink"
        >
          <Search className="size-3.5" aria-hidden="true" />
          <span className="flex-1 text-left">Search or run…</span>
          <Kbd>{isMac() ? '⌘K' : 'Ctrl K'}</Kbd>
        </button>
      </div>
      {org ? (
        <nav aria-label="Main" className="flex-1 overflow-y-auto px-3">
          <ul className="space-y-0.5">
            <NavItem to="/orgs/$org" slug={org.slug} icon={<Boxes />} label="Workloads" exact={false} />
            <NavItem to="/orgs/$org/secrets" slug={org.slug} icon={<LockKeyhole />} label="Secrets" />
            <NavItem to="/orgs/$org/activity" slug={org.slug} icon={<Activity />} label="Activity" />
          </ul>
          <p className="mt-5 mb-1 px-2 text-2xs font-medium text-muted">Organisation</p>
          <ul className="space-y-0.5">
            <NavItem to="/orgs/$org/members" slug={org.slug} icon={<Users />} label="Members" />
            <NavItem to="/orgs/$org/api-keys" slug={org.slug} icon={<KeyRound />} label="API keys" />
          </ul>
        </nav>
      ) : (
        <div className="flex-1" />
      )}
      <div className="border-t border-line p-3">
        <div className="mb-1 flex h-7 items-center justify-between px-2">
          {org ? <ConnectionBadge /> : <span />}
          <Button variant="ghost" size="icon-sm" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)" onClick={() => open('shortcuts')} className="-mr-1.5 max-lg:hidden!">
            <Keyboard aria-hidden="true" />
          </Button>
        </div>
        <UserMenu me={me} signOut={signOut} />
      </div>
    </>
  )
}

const navLink =
  'group flex h-8 items-center gap-2.5 rounded-lg px-2 text-sm text-ink-2 transition-colors duration-100 hover:bg-hover hover:text-ink pointer-coarse:h-10 [&_svg]:size-4 [&_svg]:text-muted'
const navActive = 'bg-panel! text-ink! font-medium shadow-raised ring-1 ring-line [&_svg]:text-accent-ink!'

function NavItem({ to, slug, icon, label, exact = true }: { to: '/orgs/$org' | '/orgs/$org/secrets' | '/orgs/$org/activity' | '/orgs/$org/members' | '/orgs/$org/api-keys'; slug: string; icon: ReactNode; label: string; exact?: boolean }) {
  const workloads = /^\/orgs\/[^/]+(\/(workloads\/.*|deploy))?\/?$/
  const path = useLocation({ select: (at) => at.pathname })
  const active = !exact && workloads.test(path)
  return (
    <li>
      <Link
        to={to}
        params={{ org: slug }}
        activeOptions={{ exact: true, includeSearch: false }}
        activeProps={{ className: navActive }}
        className={cn(navLink, active && navActive)}
        {...(active ? { 'aria-current': 'page' as const } : {})}
      >
        <span aria-hidden="true" className="contents">
          {icon}
        </span>
        {label}
      </Link>
    </li>
  )
}

export function isMac(): boolean {
  return /Mac|iPhone|iPad/.test(navigator.platform)
}

function OrgSwitch({ me, org, open }: { me: Me; org: Org | undefined; open: (overlay: Overlay) => void }) {
  const navigate = useNavigate()
  return (
    <Menu
      align="start"
      width="w-54"
      className="flex min-w-0 flex-1 items-center gap-2.5 rounded-lg px-1.5 py-1.5 text-left hover:bg-hover"
      entries={[
        {
          kind: 'radio',
          label: 'Organisations',
          value: org?.slug ?? '',
          onChange: (slug) => void navigate({ to: '/orgs/$org', params: { org: slug } }),
          options: me.orgs.map((o) => ({ value: o.slug, label: o.name })),
        },
        { kind: 'separator' },
        { kind: 'item', label: 'New organisation…', icon: <Plus aria-hidden="true" />, onSelect: () => open('new-org') },
      ]}
    >
      <Logo />
      <span className="min-w-0 flex-1">
        <span className="block truncate text-sm leading-4 font-semibold">{org?.name ?? 'ClawHQ'}</span>
        {org && <span className="block truncate text-2xs leading-4 text-muted first-letter:uppercase">{org.tier} plan</span>}
      </span>
      <span className="sr-only">, switch organisation</span>
      <ChevronsUpDown className="size-3.5 shrink-0 text-muted" aria-hidden="true" />
    </Menu>
  )
}

function UserMenu({ me, signOut }: { me: Me; signOut: () => void }) {
  const theme = useThemeChoice()
  const navigate = useNavigate()
  const email = me.user?.email ?? ''
  return (
    <Menu
      align="start"
      side="top"
      width="w-54"
      className="flex w-full min-w-0 items-center gap-2.5 rounded-lg px-2 py-1.5 text-left text-sm hover:bg-hover"
      entries={[
        {
          kind: 'radio',
          label: 'Theme',
          value: theme,
          onChange: (value) => setTheme(value as ThemeChoice),
          options: [
            { value: 'system', label: 'System', icon: <Monitor aria-hidden="true" /> },
            { value: 'light', label: 'Light', icon: <Sun aria-hidden="true" /> },
            { value: 'dark', label: 'Dark', icon: <Moon aria-hidden="true" /> },
          ],
        },
        { kind: 'separator' },
        { kind: 'item', label: 'Account and sessions', icon: <CircleUser aria-hidden="true" />, onSelect: () => void navigate({ to: '/account' }) },
        { kind: 'item', label: 'Sign out', icon: <LogOut aria-hidden="true" />, onSelect: signOut },
      ]}
    >
      <span aria-hidden="true" className="flex size-6 shrink-0 items-center justify-center rounded-full bg-accent-soft text-2xs font-semibold text-accent-ink uppercase">
        {email[0]}
      </span>
      <span className="min-w-0 flex-1 truncate text-ink-2">{email}</span>
      <span className="sr-only">, account menu</span>
    </Menu>
  )
}
