// The wire of `term.v1`: binary messages are terminal bytes, text messages are control frames in JSON.

export type TermStatus =
  | { kind: 'connecting' }
  | { kind: 'open' }
  | { kind: 'exited'; code: number | null; reason: string | null }
  | { kind: 'lost'; why: string }

/** Bytes shown are acknowledged in steps of this size, so that the server's window (1 MiB) never runs dry. */
export const ACK_STEP = 128 * 1024

export interface Exit {
  code: number | null
  reason: string | null
}

/** Reads a control frame; what is no exit is ignored, as later versions may say more. */
export function readExit(text: string): Exit | undefined {
  let frame: unknown
  try {
    frame = JSON.parse(text)
  } catch {
    return undefined
  }
  if (typeof frame !== 'object' || frame === null) return undefined
  const { type, code, exit_code, reason } = frame as Record<string, unknown>
  if (type !== 'exit') return undefined
  const value = typeof code === 'number' ? code : typeof exit_code === 'number' ? exit_code : null
  return { code: value, reason: typeof reason === 'string' ? reason : null }
}

/** Counts what was shown and says when to acknowledge how many bytes. */
export class AckCounter {
  private pending = 0

  shown(bytes: number): number | undefined {
    this.pending += bytes
    if (this.pending < ACK_STEP) return undefined
    const ack = this.pending
    this.pending = 0
    return ack
  }
}
