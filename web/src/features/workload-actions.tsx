import { useQueryClient } from '@tanstack/react-query'
import { useState } from 'react'
import { toast } from '@/components/ui/toast'
import { api, type Action } from '@/lib/api'
import { keys } from '@/lib/queries'
import { canRestart, canStart, canStop } from '@/lib/states'
import type { Workload } from '@/lib/types'

interface Actions {
  busy: Action | null
  start?: () => void
  stop?: () => void
  restart?: () => void
}

/** What can be done to a workload in its state now; what cannot is absent. */
export function useWorkloadActions(org: string, workload: Workload): Actions {
  const [busy, setBusy] = useState<Action | null>(null)
  const client = useQueryClient()
  const run = (action: Action, done: string, undo?: Action) => () => {
    if (busy) return
    setBusy(action)
    api
      .act(org, workload.name, action)
      .then(
        (next) => {
          client.setQueryData(keys.workload(org, workload.name), next)
          void client.invalidateQueries({ queryKey: keys.workloads(org) })
          const back = undo
            ? {
                label: 'Undo',
                run: () =>
                  void api.act(org, workload.name, undo).then(
                    () => client.invalidateQueries({ queryKey: keys.workload(org, workload.name) }),
                    (error: unknown) => toast.error(`Could not ${undo} ${workload.name}`, error),
                  ),
              }
            : undefined
          toast.ok(done, undefined, back)
        },
        (error: unknown) => toast.error(`Could not ${action} ${workload.name}`, error),
      )
      .finally(() => setBusy(null))
  }
  return {
    busy,
    ...(canStart(workload) ? { start: run('start', `Starting ${workload.name}`) } : {}),
    ...(canStop(workload) ? { stop: run('stop', `Stopping ${workload.name}`, 'start') } : {}),
    ...(canRestart(workload) ? { restart: run('restart', `Restarting ${workload.name}`) } : {}),
  }
}
