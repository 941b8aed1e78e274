// Runs vitest and ends with one plain line, `N passed, N failed`, for whoever counts.
import { startVitest } from 'vitest/node'

const vitest = await startVitest('test', process.argv.slice(2), { watch: false })
const tests = vitest.state.getTestModules().flatMap((module) => [...module.children.allTests()])
const failed = tests.filter((test) => test.result().state === 'failed').length
const passed = tests.filter((test) => test.result().state === 'passed').length
const broken = vitest.state.getTestModules().filter((module) => module.errors().length > 0).length + vitest.state.getUnhandledErrors().length
await vitest.close()
console.log(`${passed} passed, ${failed + broken} failed`)
process.exit(failed + broken > 0 || passed === 0 ? 1 : 0)
