import { useQuery, useQueryClient } from '@tanstack/react-query'
import { UserPlus } from 'lucide-react'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Confirm } from '@/components/ui/confirm'
import { Dialog } from '@/components/ui/dialog'
import { Field, Input, Select } from '@/components/ui/field'
import { Ago, Badge, Card, PageHeader, Skeleton } from '@/components/ui/misc'
import { ErrorState, ProblemNote } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { api } from '@/lib/api'
import { email as emailForm, fieldErrors } from '@/lib/forms'
import { asApiError } from '@/lib/problem'
import { keys, meQuery, membersQuery } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import type { Member } from '@/lib/types'

export function MembersPage({ org }: { org: string }) {
  useTitle('Members')
  const me = useQuery(meQuery)
  const members = useQuery(membersQuery(org))
  const client = useQueryClient()
  const [adding, setAdding] = useState(false)
  const [removing, setRemoving] = useState<Member | null>(null)
  const owner = me.data?.orgs.find((o) => o.slug === org)?.role === 'owner'
  return (
    <>
      <PageHeader
        title="Members"
        description="Owners manage members and keys. Members run workloads and set secrets."
        actions={
          owner && (
            <Button variant="primary" onClick={() => setAdding(true)}>
              <UserPlus aria-hidden="true" />
              Add member
            </Button>
          )
        }
      />
      <Card className="overflow-hidden">
        {members.isPending ? (
          <div className="px-4 py-5">
            <Skeleton className="h-4 w-56" />
          </div>
        ) : members.isError && !members.data ? (
          <ErrorState error={members.error} onRetry={() => void members.refetch()} />
        ) : (
          <ul className="divide-y divide-line">
            {members.data?.map((member) => {
              const self = member.user_id === me.data?.user?.id
              return (
                <li key={member.user_id} className="flex flex-wrap items-center gap-x-3 gap-y-1 px-4 py-3">
                  <span aria-hidden="true" className="flex size-7 items-center justify-center rounded-full bg-accent-soft text-xs font-semibold text-accent-ink uppercase">
                    {member.email[0]}
                  </span>
                  <p className="min-w-0 flex-1 basis-40 truncate text-sm">
                    {member.email}
                    {self && <span className="text-muted"> (you)</span>}
                  </p>
                  <Badge tone={member.role === 'owner' ? 'accent' : 'idle'}>{member.role}</Badge>
                  <span className="text-xs text-muted">
                    since <Ago at={member.created_at} />
                  </span>
                  {(owner || self) && (
                    <Button size="sm" variant="ghost" onClick={() => setRemoving(member)}>
                      {self ? 'Leave' : 'Remove'}
                      <span className="sr-only"> {member.email}</span>
                    </Button>
                  )}
                </li>
              )
            })}
          </ul>
        )}
      </Card>
      {!owner && members.isSuccess && <p className="mt-3 text-xs text-muted">Only owners can add or remove people.</p>}
      {adding && <AddMember org={org} onClose={() => setAdding(false)} />}
      <Confirm
        open={removing !== null}
        onOpenChange={(open) => !open && setRemoving(null)}
        title={removing?.user_id === me.data?.user?.id ? 'Leave this organisation?' : `Remove ${removing?.email ?? ''}?`}
        action={removing?.user_id === me.data?.user?.id ? 'Leave' : 'Remove'}
        onConfirm={async () => {
          if (!removing) return
          await api.removeMember(org, removing.user_id)
          await client.invalidateQueries({ queryKey: keys.members(org) })
          await client.invalidateQueries({ queryKey: keys.me })
          toast.ok(`${removing.email} is no longer a member`)
        }}
      >
        They lose sight of its workloads and secrets at once. What they made stays.
      </Confirm>
    </>
  )
}

function AddMember({ org, onClose }: { org: string; onClose: () => void }) {
  const [email, setEmail] = useState('')
  const [role, setRole] = useState('member')
  const [tried, setTried] = useState(false)
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const client = useQueryClient()
  const problem = fieldErrors(emailForm, email)['']
  const save = async () => {
    setTried(true)
    if (problem || busy) return
    setBusy(true)
    setError(null)
    try {
      await api.addMember(org, { email: email.trim(), role })
      await client.invalidateQueries({ queryKey: keys.members(org) })
      toast.ok(`${email.trim()} is a member now`)
      onClose()
    } catch (e) {
      setError(e)
      setBusy(false)
    }
  }
  return (
    <Dialog
      open
      onOpenChange={(open) => {
        if (!open && !busy) onClose()
      }}
      title="Add a member"
      description="Somebody who has an account already."
      size="sm"
      footer={
        <>
          <Button onClick={onClose}>Cancel</Button>
          <Button variant="primary" busy={busy} onClick={() => void save()}>
            Add
          </Button>
        </>
      }
    >
      <form
        noValidate
        className="space-y-4"
        onSubmit={(event) => {
          event.preventDefault()
          void save()
        }}
      >
        <Field label="E-mail" error={(tried ? problem : undefined) ?? (error === null ? undefined : asApiError(error).field('/email'))}>
          <Input type="email" value={email} onChange={(event) => setEmail(event.target.value)} autoComplete="off" />
        </Field>
        <Field label="Role">
          <Select value={role} onChange={(event) => setRole(event.target.value)}>
            <option value="member">Member: workloads and secrets</option>
            <option value="owner">Owner: everything</option>
          </Select>
        </Field>
        {error !== null && <ProblemNote error={error} />}
      </form>
    </Dialog>
  )
}
