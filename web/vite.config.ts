import { fileURLToPath } from 'node:url'
import tailwindcss from '@tailwindcss/vite'
import { tanstackRouter } from '@tanstack/router-plugin/vite'
import react from '@vitejs/plugin-react'
import { defineConfig } from 'vitest/config'

export default defineConfig({
  plugins: [tanstackRouter({ target: 'react', autoCodeSplitting: true }), react(), tailwindcss()],
  resolve: { alias: { '@': fileURLToPath(new URL('./src', import.meta.url)) } },
  server: { proxy: { '/v1': { target: 'http://127.0.0.1:4180', ws: true } } },
  build: {
    target: 'es2022',
    manifest: true,
    // Every browser that runs ES2022 knows modulepreload; the polyfill would be dead weight.
    modulePreload: { polyfill: false },
    // Data URLs would need font-src and img-src exceptions in the content security policy.
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: {
        // Few files for the first page (each costs a request), and the rest by route.
        codeSplitting: {
          includeDependenciesRecursively: false,
          groups: [
            { name: 'react', test: /node_modules\/(react|react-dom|scheduler|use-sync-external-store)\//, priority: 30 },
            { name: 'base', test: /node_modules\/(@tanstack\/(react-router|router-core|history|react-store|store|react-query|query-core)|clsx|class-variance-authority|openapi-fetch)\//, priority: 20 },
            { name: 'kit', test: /(node_modules\/lucide-react\/|src\/components\/(ui\/(button|dialog|field|menu|misc|problem|toast)|logo|template-art|route-states)\.tsx|src\/lib\/(api|cn|curl|format|live|problem|queries|session|shortcuts|sse|states|storage|theme|title)\.ts)/, minShareCount: 2, priority: 10 },
          ],
        },
      },
    },
  },
  test: {
    environment: 'happy-dom',
    setupFiles: ['./src/test-setup.ts'],
    include: ['src/**/*.test.{ts,tsx}'],
    restoreMocks: true,
  },
})
