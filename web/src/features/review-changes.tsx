import { useQuery } from '@tanstack/react-query'
import { useState } from 'react'
import { DiffView } from '@/components/diff-view'
import { Button } from '@/components/ui/button'
import { Dialog } from '@/components/ui/dialog'
import { Skeleton } from '@/components/ui/misc'
import { ProblemNote } from '@/components/ui/problem'
import { api } from '@/lib/api'
import { plural } from '@/lib/format'
import type { Config, Workload } from '@/lib/types'

/** Asks the server what a config would change, shows it, and applies it when told to. */
export function ReviewChanges(props: { org: string; name: string; config: Config; title: string; onClose: () => void; onApplied: (workload: Workload) => void }) {
  const preview = useQuery({
    queryKey: ['dry-run', props.org, props.name, props.config],
    queryFn: () => api.diffConfig(props.org, props.name, props.config),
    gcTime: 0,
    staleTime: Number.POSITIVE_INFINITY,
    retry: false,
  })
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const count = preview.data?.diff.length ?? 0
  const apply = async () => {
    setBusy(true)
    setError(null)
    try {
      props.onApplied(await api.applyConfig(props.org, props.name, props.config))
    } catch (e) {
      setError(e)
    } finally {
      setBusy(false)
    }
  }
  return (
    <Dialog
      open
      onOpenChange={(open) => {
        if (!open && !busy) props.onClose()
      }}
      title={props.title}
      description="A change makes a new release, and the workload is started anew with it."
      footer={
        <>
          <Button onClick={props.onClose}>Cancel</Button>
          <Button variant="primary" disabled={count === 0} busy={busy} onClick={() => void apply()}>
            {count > 0 ? `Apply ${plural(count, 'change')}` : 'Apply'}
          </Button>
        </>
      }
    >
      <div className="space-y-4">
        {preview.isPending && <Skeleton className="h-24" />}
        {preview.isError && <ProblemNote error={preview.error} title="This config is refused" />}
        {preview.data && count === 0 && <p className="text-sm text-muted">Nothing would change: the workload runs with exactly this already.</p>}
        {preview.data && count > 0 && <DiffView changes={preview.data.diff} />}
        {error !== null && <ProblemNote error={error} />}
      </div>
    </Dialog>
  )
}
