import { useQueryClient } from '@tanstack/react-query'
import { useNavigate } from '@tanstack/react-router'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Dialog } from '@/components/ui/dialog'
import { Field, Input } from '@/components/ui/field'
import { ProblemNote } from '@/components/ui/problem'
import { api } from '@/lib/api'
import { asApiError } from '@/lib/problem'
import { keys } from '@/lib/queries'

export default function NewOrg(props: { open: boolean; onOpenChange: (open: boolean) => void }) {
  const [name, setName] = useState('')
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const client = useQueryClient()
  const navigate = useNavigate()
  const submit = async () => {
    if (name.trim() === '' || busy) return
    setBusy(true)
    setError(null)
    try {
      const org = await api.createOrg({ name: name.trim() })
      await client.refetchQueries({ queryKey: keys.me })
      setName('')
      props.onOpenChange(false)
      void navigate({ to: '/orgs/$org', params: { org: org.slug } })
    } catch (e) {
      setError(e)
    } finally {
      setBusy(false)
    }
  }
  return (
    <Dialog
      {...props}
      title="New organisation"
      description="Workloads, secrets and members belong to an organisation. Nothing is shared between two of them."
      size="sm"
      footer={
        <>
          <Button onClick={() => props.onOpenChange(false)}>Cancel</Button>
          <Button variant="primary" busy={busy} disabled={name.trim() === ''} onClick={() => void submit()}>
            Create
          </Button>
        </>
      }
    >
      <form
        className="space-y-4"
        onSubmit={(event) => {
          event.preventDefault()
          void submit()
        }}
      >
        <Field label="Name" error={error ? asApiError(error).field('/name') : undefined}>
          <Input value={name} onChange={(event) => setName(event.target.value)} maxLength={64} autoComplete="organization" />
        </Field>
        {error !== null && <ProblemNote error={error} />}
      </form>
    </Dialog>
  )
}
