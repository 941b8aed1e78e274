import { useQuery, useQueryClient } from '@tanstack/react-query'
import { History, LockKeyhole, Plus, RefreshCw, Trash2 } from 'lucide-react'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Confirm } from '@/components/ui/confirm'
import { Dialog } from '@/components/ui/dialog'
import { Ago, Card, EmptyState, PageHeader, Skeleton } from '@/components/ui/misc'
import { ErrorState, ProblemNote } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { api } from '@/lib/api'
import { keys, membersQuery, secretsQuery } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import { SecretDialog } from './secret-dialog'

export function SecretsPage({ org }: { org: string }) {
  useTitle('Secrets')
  const secrets = useQuery(secretsQuery(org))
  const client = useQueryClient()
  const [editing, setEditing] = useState<{ name?: string } | null>(null)
  const [deleting, setDeleting] = useState<string | null>(null)
  const [history, setHistory] = useState<string | null>(null)
  return (
    <>
      <PageHeader
        title="Secrets"
        description="Keys and passwords for your workloads. They are set and replaced here, given to containers at the start, and never readable again."
        actions={
          <Button variant="primary" onClick={() => setEditing({})}>
            <Plus aria-hidden="true" />
            New secret
          </Button>
        }
      />
      <Card className="overflow-hidden">
        {secrets.isPending ? (
          [0, 1, 2].map((i) => (
            <div key={i} className="border-b border-line px-4 py-4 last:border-0">
              <Skeleton className="h-4 w-56" />
            </div>
          ))
        ) : secrets.isError && !secrets.data ? (
          <ErrorState error={secrets.error} onRetry={() => void secrets.refetch()} />
        ) : secrets.data?.length === 0 ? (
          <EmptyState
            icon={<LockKeyhole />}
            title="No secrets yet"
            action={
              <Button variant="primary" onClick={() => setEditing({})}>
                Set your first secret
              </Button>
            }
          >
            Set one here, then refer to it from a workload’s config: as an environment variable or as a file.
          </EmptyState>
        ) : (
          <ul className="divide-y divide-line">
            {secrets.data?.map((secret) => (
              <li key={secret.id} className="flex items-center gap-3 px-4 py-2.5">
                <LockKeyhole className="size-4 shrink-0 text-muted" aria-hidden="true" />
                <div className="min-w-0 flex-1">
                  <code className="block truncate font-mono text-sm">{secret.name}</code>
                  <p className="truncate text-xs text-muted">
                    version {secret.version}, set <Ago at={secret.updated_at} />
                  </p>
                </div>
                <span className="flex">
                  <Button size="icon-sm" variant="ghost" aria-label={`New version of ${secret.name}`} title="New version" onClick={() => setEditing({ name: secret.name })}>
                    <RefreshCw aria-hidden="true" />
                  </Button>
                  <Button size="icon-sm" variant="ghost" aria-label={`Versions of ${secret.name}`} title="Versions" onClick={() => setHistory(secret.name)}>
                    <History aria-hidden="true" />
                  </Button>
                  <Button size="icon-sm" variant="ghost" aria-label={`Delete ${secret.name}`} title="Delete" onClick={() => setDeleting(secret.name)}>
                    <Trash2 aria-hidden="true" />
                  </Button>
                </span>
              </li>
            ))}
          </ul>
        )}
      </Card>
      {editing && <SecretDialog org={org} {...(editing.name ? { name: editing.name } : {})} onClose={() => setEditing(null)} onSaved={() => setEditing(null)} />}
      {history && <Versions org={org} name={history} onClose={() => setHistory(null)} />}
      <Confirm
        open={deleting !== null}
        onOpenChange={(open) => !open && setDeleting(null)}
        title={`Delete ${deleting ?? ''}?`}
        action="Delete secret"
        onConfirm={async () => {
          await api.deleteSecret(org, deleting ?? '')
          await client.invalidateQueries({ queryKey: keys.secrets(org) })
          toast.ok(`${deleting} deleted`)
        }}
      >
        All its versions are destroyed. What runs with it keeps running; a start that needs it will fail until the reference is removed.
      </Confirm>
    </>
  )
}

function Versions({ org, name, onClose }: { org: string; name: string; onClose: () => void }) {
  const versions = useQuery({ queryKey: [...keys.secrets(org), name], queryFn: ({ signal }) => api.secretVersions(org, name, signal) })
  const members = useQuery(membersQuery(org))
  return (
    <Dialog open onOpenChange={(open) => !open && onClose()} title={`Versions of ${name}`} size="sm">
      {versions.isPending && <Skeleton className="h-20" />}
      {versions.isError && <ProblemNote error={versions.error} />}
      <ol className="divide-y divide-line">
        {[...(versions.data ?? [])]
          .sort((a, b) => b.version - a.version)
          .map((v) => (
            <li key={v.version} className="flex items-baseline justify-between gap-3 py-2 text-sm">
              <span className="font-medium">Version {v.version}</span>
              <span className="min-w-0 truncate text-xs text-muted">
                <Ago at={v.created_at} />
                {v.created_by && ` · ${members.data?.find((m) => m.user_id === v.created_by)?.email ?? v.created_by}`}
              </span>
            </li>
          ))}
      </ol>
    </Dialog>
  )
}
