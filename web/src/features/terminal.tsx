import { useQuery } from '@tanstack/react-query'
import { SquareTerminal } from 'lucide-react'
import { lazy, Suspense } from 'react'
import { Card, EmptyState, Skeleton } from '@/components/ui/misc'
import { Button } from '@/components/ui/button'
import { workloadQuery } from '@/lib/queries'
import { hasProcess, stateLook } from '@/lib/states'
import { useTitle } from '@/lib/title'
import { useWorkloadActions } from './workload-actions'
import type { Workload } from '@/lib/types'

const Screen = lazy(() => import('./terminal-screen'))

export function TerminalTab({ org, name }: { org: string; name: string }) {
  useTitle('Terminal', name)
  const { data: workload } = useQuery(workloadQuery(org, name))
  const blank = <Skeleton className="h-[max(20rem,calc(100dvh-16.5rem))] rounded-xl" />
  if (!workload) return blank
  if (!hasProcess(workload)) return <Unavailable org={org} workload={workload} />
  return (
    <Suspense fallback={blank}>
      <Screen org={org} name={name} />
    </Suspense>
  )
}

function Unavailable({ org, workload }: { org: string; workload: Workload }) {
  const actions = useWorkloadActions(org, workload)
  return (
    <Card>
      <EmptyState
        icon={<SquareTerminal />}
        title={`${workload.name} is ${stateLook(workload.state).label.toLowerCase()}`}
        action={
          actions.start && (
            <Button variant="primary" busy={actions.busy === 'start'} onClick={actions.start}>
              Start it
            </Button>
          )
        }
      >
        A terminal opens inside its container, so it has to run.
      </EmptyState>
    </Card>
  )
}
