import { useQueryClient } from '@tanstack/react-query'
import { createFileRoute, Link, useNavigate, useRouter } from '@tanstack/react-router'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Field, Input } from '@/components/ui/field'
import { ProblemNote } from '@/components/ui/problem'
import { AuthCard } from '@/features/auth-card'
import { api } from '@/lib/api'
import { keys } from '@/lib/queries'
import { safeNext } from '@/lib/session'
import { useTitle } from '@/lib/title'

export const Route = createFileRoute('/sign-in')({
  validateSearch: (search: Record<string, unknown>): { next?: string } => {
    const next = typeof search.next === 'string' ? safeNext(search.next) : undefined
    return next ? { next } : {}
  },
  component: SignIn,
})

function SignIn() {
  useTitle('Sign in')
  const { next } = Route.useSearch()
  const [email, setEmail] = useState('')
  const [password, setPassword] = useState('')
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const client = useQueryClient()
  const router = useRouter()
  const navigate = useNavigate()

  const submit = async () => {
    if (busy) return
    setBusy(true)
    setError(null)
    try {
      await api.signIn({ email: email.trim(), password })
      client.removeQueries({ queryKey: keys.me })
      if (next) router.history.push(next)
      else await navigate({ to: '/' })
    } catch (e) {
      setError(e)
      setBusy(false)
    }
  }

  return (
    <AuthCard
      title="Sign in"
      lead={next ? 'Sign in to go on where you were.' : 'Welcome back.'}
      footer={
        <>
          New here?{' '}
          <Link to="/sign-up" className="font-medium text-ink underline decoration-line-strong underline-offset-4 hover:decoration-ink">
            Create an account
          </Link>
        </>
      }
    >
      <form
        noValidate
        className="space-y-4"
        onSubmit={(event) => {
          event.preventDefault()
          void submit()
        }}
      >
        <Field label="E-mail">
          <Input type="email" name="email" autoComplete="username" autoFocus required value={email} onChange={(event) => setEmail(event.target.value)} className="h-10!" />
        </Field>
        <Field label="Password">
          <Input type="password" name="password" autoComplete="current-password" required value={password} onChange={(event) => setPassword(event.target.value)} className="h-10!" />
        </Field>
        {error !== null && <ProblemNote error={error} />}
        <Button type="submit" variant="primary" size="lg" className="w-full" busy={busy} disabled={email === '' || password === ''}>
          Sign in
        </Button>
      </form>
    </AuthCard>
  )
}
