import * as z from 'zod/mini'

// The validators compile to functions otherwise, which the content security policy forbids.
z.config({ jitless: true })

export const credentials = z.object({
  email: z.string().check(z.trim(), z.minLength(1, 'Enter your e-mail address'), z.maxLength(254, 'Too long'), z.regex(/^[^\s@]+@[^\s@]+$/, 'That is not an e-mail address')),
  password: z.string().check(z.minLength(8, 'At least 8 characters'), z.maxLength(128, 'At most 128 characters')),
})

export const envName = z.string().check(z.regex(/^[A-Za-z_][A-Za-z0-9_]{0,127}$/, 'Letters, digits and underscores, not starting with a digit'))

export const secretForm = z.object({
  name: envName,
  value: z.string().check(z.minLength(1, 'Enter a value'), z.maxLength(65_536, 'At most 64 KiB')),
})

export const email = z.string().check(z.trim(), z.regex(/^[^\s@]+@[^\s@]+$/, 'That is not an e-mail address'))

// Shape only; the server knows the whole grammar of references.
export const imageRef = z.string().check(
  z.trim(),
  z.minLength(1, 'Enter an image reference'),
  z.maxLength(255, 'At most 255 characters'),
  z.regex(/^[a-z0-9][\w.\-/:]*(@sha256:[0-9a-f]{64})?$/i, 'Such as ghcr.io/team/agent:1.2'),
)

/** The first problem of each field, by name; empty when all is well. */
export function fieldErrors<T extends z.ZodMiniType>(schema: T, value: unknown): Record<string, string> {
  const result = z.safeParse(schema, value)
  if (result.success) return {}
  const out: Record<string, string> = {}
  for (const issue of result.error.issues) {
    const key = String(issue.path[0] ?? '')
    out[key] ??= issue.message
  }
  return out
}
