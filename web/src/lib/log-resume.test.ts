import { expect, it } from 'vitest'
import { LogResume } from './log-resume'

it('leaves out exactly the lines that were seen, and loses none', () => {
  const resume = new LogResume()
  expect(['1', '2', '2', '2'].map((id) => resume.accept(id))).toEqual([true, true, true, true])
  expect(resume.after).toBe('2')
  resume.reconnected()
  // Two more lines of the same millisecond had been written meanwhile.
  expect(['2', '2', '2', '2', '2', '3'].map((id) => resume.accept(id))).toEqual([false, false, false, true, true, true])
  resume.reconnected()
  expect(['3', '4', '3'].map((id) => resume.accept(id))).toEqual([false, true, true])
})

it('takes a stream that does not repeat', () => {
  const resume = new LogResume()
  resume.accept('5')
  resume.reconnected()
  expect(['6', '6'].map((id) => resume.accept(id))).toEqual([true, true])
})
