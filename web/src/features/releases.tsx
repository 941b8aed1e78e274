import { useQuery, useQueryClient } from '@tanstack/react-query'
import { GitCommitHorizontal } from 'lucide-react'
import { useState } from 'react'
import { DiffView } from '@/components/diff-view'
import { Button } from '@/components/ui/button'
import { Ago, Badge, Card, EmptyState, Skeleton } from '@/components/ui/misc'
import { ErrorState } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { shortDigest } from '@/lib/format'
import { keys, membersQuery, releasesQuery, workloadQuery } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import type { Release } from '@/lib/types'
import { ReviewChanges } from './review-changes'

export function ReleasesTab({ org, name }: { org: string; name: string }) {
  useTitle('Releases', name)
  const releases = useQuery(releasesQuery(org, name))
  const workload = useQuery(workloadQuery(org, name))
  const members = useQuery(membersQuery(org))
  const client = useQueryClient()
  const [restoring, setRestoring] = useState<Release | null>(null)
  const who = (id: string | null) => (id === null ? 'ClawHQ' : (members.data?.find((m) => m.user_id === id)?.email ?? id))
  return (
    <Card>
      <h2 className="sr-only">Releases</h2>
      {releases.isPending ? (
        <div className="space-y-4 p-4">
          {[0, 1, 2].map((i) => (
            <Skeleton key={i} className="h-14" />
          ))}
        </div>
      ) : releases.isError && !releases.data ? (
        <ErrorState error={releases.error} onRetry={() => void releases.refetch()} />
      ) : releases.data?.length === 0 ? (
        <EmptyState icon={<GitCommitHorizontal />} title="No releases">
          Each change of the config makes a release that never changes again.
        </EmptyState>
      ) : (
        <ol className="divide-y divide-line">
          {[...(releases.data ?? [])]
            .sort((a, b) => b.number - a.number)
            .map((release) => {
              const current = release.id === workload.data?.release.id
              return (
                <li key={release.id} className="px-4 py-3.5">
                  <div className="flex flex-wrap items-center gap-x-3 gap-y-1">
                    <h3 className="text-sm font-semibold">Release {release.number}</h3>
                    {current && <Badge tone="ok">current</Badge>}
                    <p className="min-w-0 flex-1 basis-48 truncate text-xs text-muted">
                      <Ago at={release.created_at} /> by {who(release.created_by)} · <span className="font-mono">{release.image.digest ? shortDigest(release.image.digest) : release.image.ref}</span>
                    </p>
                    {!current && workload.data && (
                      <Button size="sm" onClick={() => setRestoring(release)}>
                        Restore…<span className="sr-only"> release {release.number}</span>
                      </Button>
                    )}
                  </div>
                  {release.diff.length > 0 && <DiffView changes={release.diff} className="mt-2.5" />}
                </li>
              )
            })}
        </ol>
      )}
      {restoring && (
        <ReviewChanges
          org={org}
          name={name}
          config={restoring.config}
          title={`Restore release ${restoring.number}`}
          onClose={() => setRestoring(null)}
          onApplied={(next) => {
            toast.ok(`Release ${next.release.number} made from release ${restoring.number}`)
            setRestoring(null)
            void client.invalidateQueries({ queryKey: keys.workload(org, name) })
          }}
        />
      )}
    </Card>
  )
}
