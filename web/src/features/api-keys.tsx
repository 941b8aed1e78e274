import { useQuery, useQueryClient } from '@tanstack/react-query'
import { KeyRound, Plus, Trash2 } from 'lucide-react'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Confirm } from '@/components/ui/confirm'
import { Dialog } from '@/components/ui/dialog'
import { Field, Input, Select } from '@/components/ui/field'
import { Ago, Badge, Card, CodeBlock, CopyButton, EmptyState, PageHeader, Skeleton } from '@/components/ui/misc'
import { ErrorState, ProblemNote } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { api } from '@/lib/api'
import { asApiError } from '@/lib/problem'
import { apiKeysQuery, keys } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import type { ApiKey, CreatedApiKey } from '@/lib/types'

export function ApiKeysPage({ org }: { org: string }) {
  useTitle('API keys')
  const list = useQuery(apiKeysQuery(org))
  const client = useQueryClient()
  const [making, setMaking] = useState(false)
  const [opened] = useState(() => Date.now())
  const [deleting, setDeleting] = useState<ApiKey | null>(null)
  return (
    <>
      <PageHeader
        title="API keys"
        description="For programs: scripts, CI, your own agents. A key acts for this organisation, and is shown once."
        actions={
          <Button variant="primary" onClick={() => setMaking(true)}>
            <Plus aria-hidden="true" />
            New key
          </Button>
        }
      />
      <Card className="overflow-hidden">
        {list.isPending ? (
          [0, 1].map((i) => (
            <div key={i} className="border-b border-line px-4 py-4 last:border-0">
              <Skeleton className="h-4 w-56" />
            </div>
          ))
        ) : list.isError && !list.data ? (
          <ErrorState error={list.error} onRetry={() => void list.refetch()} />
        ) : list.data?.length === 0 ? (
          <EmptyState icon={<KeyRound />} title="No keys yet" action={<Button variant="primary" onClick={() => setMaking(true)}>Make a key</Button>}>
            Everything this console does is an API call. A key lets your programs do the same.
          </EmptyState>
        ) : (
          <ul className="divide-y divide-line">
            {list.data?.map((key) => (
              <li key={key.id} className="flex items-center gap-3 px-4 py-3">
                <KeyRound className="size-4 shrink-0 text-muted" aria-hidden="true" />
                <div className="min-w-0 flex-1">
                  <p className="flex items-center gap-2 text-sm font-medium">
                    <span className="truncate">{key.name}</span>
                    {key.expires_at && Date.parse(key.expires_at) < opened && <Badge tone="bad">expired</Badge>}
                  </p>
                  <p className="text-xs text-muted">
                    <code className="font-mono">{key.prefix}…</code>
                    {' · '}
                    {key.last_used_at ? (
                      <>
                        used <Ago at={key.last_used_at} />
                      </>
                    ) : (
                      'never used'
                    )}
                    {key.expires_at && Date.parse(key.expires_at) >= opened && (
                      <>
                        {' · expires '}
                        <Ago at={key.expires_at} />
                      </>
                    )}
                  </p>
                </div>
                <Button size="icon-sm" variant="ghost" aria-label={`Delete the key ${key.name}`} onClick={() => setDeleting(key)}>
                  <Trash2 aria-hidden="true" />
                </Button>
              </li>
            ))}
          </ul>
        )}
      </Card>
      {making && <NewKey org={org} onClose={() => setMaking(false)} />}
      <Confirm
        open={deleting !== null}
        onOpenChange={(open) => !open && setDeleting(null)}
        title={`Delete the key ${deleting?.name ?? ''}?`}
        action="Delete key"
        onConfirm={async () => {
          if (!deleting) return
          await api.deleteApiKey(org, deleting.id)
          await client.invalidateQueries({ queryKey: keys.apiKeys(org) })
          toast.ok(`The key ${deleting.name} is gone`)
        }}
      >
        Programs that use it are refused from this moment on.
      </Confirm>
    </>
  )
}

function NewKey({ org, onClose }: { org: string; onClose: () => void }) {
  const [name, setName] = useState('')
  const [days, setDays] = useState('90')
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const [made, setMade] = useState<CreatedApiKey | null>(null)
  const client = useQueryClient()
  const save = async () => {
    if (name.trim() === '' || busy) return
    setBusy(true)
    setError(null)
    try {
      const expires = days === '' ? {} : { expires_at: new Date(Date.now() + Number(days) * 86_400_000).toISOString() }
      setMade(await api.createApiKey(org, { name: name.trim(), ...expires }))
      void client.invalidateQueries({ queryKey: keys.apiKeys(org) })
    } catch (e) {
      setError(e)
    } finally {
      setBusy(false)
    }
  }
  if (made)
    return (
      <Dialog open onOpenChange={(open) => !open && onClose()} title={`The key ${made.name}`} description="Copy it now. It is not shown again." footer={<Button variant="primary" onClick={onClose}>Done</Button>}>
        <div className="space-y-4">
          <div className="flex items-center gap-2">
            <code className="min-w-0 flex-1 rounded-lg border border-line bg-sunken px-3 py-2 font-mono text-xs break-all" data-testid="api-key">
              {made.key ?? 'Shown by the first answer already.'}
            </code>
            {made.key && <CopyButton text={made.key} label="Copy key" size="sm" />}
          </div>
          <CodeBlock label="first call" code={`export CLAWHQ_API_KEY=${made.key ?? '…'}\ncurl -H "Authorization: Bearer $CLAWHQ_API_KEY" \\\n  ${location.origin}/v1/orgs/${org}/workloads`} />
        </div>
      </Dialog>
    )
  return (
    <Dialog
      open
      onOpenChange={(open) => {
        if (!open && !busy) onClose()
      }}
      title="New API key"
      size="sm"
      footer={
        <>
          <Button onClick={onClose}>Cancel</Button>
          <Button variant="primary" busy={busy} disabled={name.trim() === ''} onClick={() => void save()}>
            Make key
          </Button>
        </>
      }
    >
      <form
        className="space-y-4"
        onSubmit={(event) => {
          event.preventDefault()
          void save()
        }}
      >
        <Field label="Name" hint="What uses it, such as “deploy from CI”" error={error === null ? undefined : asApiError(error).field('/name')}>
          <Input value={name} onChange={(event) => setName(event.target.value)} maxLength={64} autoComplete="off" />
        </Field>
        <Field label="Expires">
          <Select value={days} onChange={(event) => setDays(event.target.value)}>
            <option value="30">in 30 days</option>
            <option value="90">in 90 days</option>
            <option value="365">in a year</option>
            <option value="">never</option>
          </Select>
        </Field>
        {error !== null && <ProblemNote error={error} />}
      </form>
    </Dialog>
  )
}
