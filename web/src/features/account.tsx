import { useQuery, useQueryClient } from '@tanstack/react-query'
import { useNavigate } from '@tanstack/react-router'
import { Laptop, Monitor, Moon, Smartphone, Sun } from 'lucide-react'
import { Button } from '@/components/ui/button'
import { Ago, Badge, Card, CardTitle, PageHeader, Skeleton } from '@/components/ui/misc'
import { ErrorState } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { api } from '@/lib/api'
import { cn } from '@/lib/cn'
import { keys, meQuery, sessionsQuery } from '@/lib/queries'
import { setTheme, type ThemeChoice, useThemeChoice } from '@/lib/theme'
import { useTitle } from '@/lib/title'
import { device } from '@/lib/user-agent'

const themes: { value: ThemeChoice; label: string; Icon: typeof Sun }[] = [
  { value: 'system', label: 'System', Icon: Monitor },
  { value: 'light', label: 'Light', Icon: Sun },
  { value: 'dark', label: 'Dark', Icon: Moon },
]

export function AccountPage() {
  useTitle('Account')
  const me = useQuery(meQuery)
  const sessions = useQuery(sessionsQuery)
  const theme = useThemeChoice()
  const client = useQueryClient()
  const navigate = useNavigate()
  const signOut = () =>
    api.signOut().then(
      () => {
        client.clear()
        void navigate({ to: '/sign-in' })
      },
      (error: unknown) => toast.error('Could not sign out', error),
    )
  const revoke = (id: string) =>
    api.revokeSession(id).then(
      () => {
        void client.invalidateQueries({ queryKey: keys.sessions })
        toast.ok('That browser is signed out')
      },
      (error: unknown) => toast.error('Could not sign it out', error),
    )
  return (
    <div className="max-w-3xl">
      <PageHeader title="Account" description={me.data?.user?.email} actions={<Button onClick={() => void signOut()}>Sign out</Button>} />
      <div className="space-y-4">
        <Card>
          <CardTitle>Appearance</CardTitle>
          <fieldset className="flex flex-wrap gap-2 p-4">
            <legend className="sr-only">Theme</legend>
            {themes.map(({ value, label, Icon }) => (
              <label
                key={value}
                className={cn(
                  'flex flex-1 basis-28 cursor-pointer items-center gap-2.5 rounded-lg border px-3 py-2.5 text-sm has-focus-visible:outline-2 has-focus-visible:outline-offset-2 has-focus-visible:outline-accent',
                  theme === value ? 'border-ink font-medium ring-1 ring-ink' : 'border-line text-ink-2 hover:border-line-strong',
                )}
              >
                <input type="radio" name="theme" value={value} checked={theme === value} onChange={() => setTheme(value)} className="sr-only" />
                <Icon className="size-4 text-muted" aria-hidden="true" />
                {label}
              </label>
            ))}
          </fieldset>
        </Card>
        <Card>
          <CardTitle>Where you are signed in</CardTitle>
          {sessions.isPending ? (
            <div className="px-4 py-5">
              <Skeleton className="h-4 w-64" />
            </div>
          ) : sessions.isError && !sessions.data ? (
            <ErrorState error={sessions.error} onRetry={() => void sessions.refetch()} />
          ) : (
            <ul className="divide-y divide-line">
              {sessions.data?.map((session) => {
                const seen = device(session.user_agent)
                const Icon = seen.mobile ? Smartphone : Laptop
                return (
                  <li key={session.id} className="flex items-center gap-3 px-4 py-3">
                    <Icon className="size-4 shrink-0 text-muted" aria-hidden="true" />
                    <div className="min-w-0 flex-1">
                      <p className="flex items-center gap-2 text-sm">
                        <span className="truncate">{seen.name}</span>
                        {session.current && <Badge tone="ok">this browser</Badge>}
                      </p>
                      <p className="truncate text-xs text-muted">
                        {session.ip && `${session.ip} · `}
                        signed in <Ago at={session.created_at} />
                        {session.last_seen_at && (
                          <>
                            {' · seen '}
                            <Ago at={session.last_seen_at} />
                          </>
                        )}
                      </p>
                    </div>
                    {!session.current && (
                      <Button size="sm" onClick={() => void revoke(session.id)}>
                        Sign out<span className="sr-only"> {seen.name}</span>
                      </Button>
                    )}
                  </li>
                )
              })}
            </ul>
          )}
        </Card>
      </div>
    </div>
  )
}
