// The health service: probes, metrics, and the page for people. It knows only the
// functions that it is given.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The health service's fixed bounds; the package doc lists what happens at each.
const (
	checkTimeout  = 2 * time.Second        // for all checks of a probe; probes of the manifests wait five seconds
	checkInterval = time.Second            // between looks at all checks, for since when they hold
	viewersLimit  = 16                     // pages that are open
	viewInterval  = 500 * time.Millisecond // between looks at what a page shows
	viewLonely    = 5 * time.Second        // after which it is sent although nothing has changed
	viewTimeout   = 5 * time.Second        // for a page to take it
	journalSize   = 200                    // entries that are kept
	seriesStep    = 10                     // seconds of one point of the plots
	seriesSize    = 60                     // points
)

// Check is one thing that must hold.
type Check struct {
	Name string
	Of   string // live or ready: which probe asks for it

	// Test returns the reason when it does not hold, and gives up when its context
	// ends.
	Test func(context.Context) error
}

// verdict is what a check said last; safe to show.
type verdict struct {
	Name    string     `json:"name"`
	Of      string     `json:"of"` // live or ready
	OK      bool       `json:"ok"`
	Since   time.Time  `json:"since"`
	Error   string     `json:"error,omitempty"` // the last one, also of a check that holds again
	ErrorAt *time.Time `json:"errorAt,omitempty"`
}

// Health answers probes, scrapes and people. It knows nothing of what it reports
// on: whoever makes it fills in the first part. Run keeps its checks fresh.
type Health struct {
	Info    map[string]string // constant facts: role, version
	Checks  []Check
	Metrics []Metric
	State   func() any // what the page shows of the role
	Journal interface {
		latest() any
		series(now time.Time) series
	}

	viewers  atomic.Int32
	mu       sync.Mutex
	verdicts []verdict // guarded by mu; one for each of Checks, once any was asked
}

// Run looks at all checks now and then until ctx ends, so that since when they
// hold, or do not, does not depend on who asks.
func (h *Health) Run(ctx context.Context) {
	look := time.NewTicker(checkInterval)
	defer look.Stop()
	for {
		h.look(ctx, "")
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
	}
}

// ServeHTTP is the route table.
func (h *Health) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	for name, value := range pageHeader {
		w.Header().Set(name, value)
	}
	switch r.URL.Path {
	case "/live":
		h.probe(w, r, "live")
	case "/ready":
		h.probe(w, r, "ready")
	case "/health":
		h.summary(w, r)
	case "/metrics":
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		io.WriteString(w, h.exposition())
	case "/":
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(w, page)
	case "/status":
		w.Header().Set("Content-Type", "application/json")
		w.Write(append(h.status().at(time.Now()), '\n'))
	case "/events":
		h.serveEvents(w, r)
	default:
		http.NotFound(w, r)
	}
}

// look asks the checks of a probe, or with "" all of them, and returns why one does
// not hold.
func (h *Health) look(ctx context.Context, of string) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	for i, check := range h.Checks {
		if of != "" && of != check.Of {
			continue
		}
		err := check.Test(ctx)
		h.note(i, err)
		if err != nil && failed == nil {
			failed = fmt.Errorf("%s: %w", check.Name, err)
		}
	}
	return failed
}

// note keeps what check i said.
func (h *Health) note(i int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	for _, c := range h.Checks[len(h.verdicts):] {
		h.verdicts = append(h.verdicts, verdict{Name: c.Name, Of: c.Of, OK: true, Since: now})
	}
	v := &h.verdicts[i]
	if (err == nil) != v.OK {
		v.OK, v.Since = err == nil, now
	}
	if err != nil {
		v.Error, v.ErrorAt = err.Error(), &now
	}
}

// noted is a copy of what all checks said last.
func (h *Health) noted() []verdict {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]verdict{}, h.verdicts...)
}

func (h *Health) probe(w http.ResponseWriter, r *http.Request, of string) {
	if err := h.look(r.Context(), of); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ok\n")
}

// summary is all checks and the facts in JSON; 503 when one check fails.
func (h *Health) summary(w http.ResponseWriter, r *http.Request) {
	h.look(r.Context(), "")
	checks, status := h.noted(), http.StatusOK
	doc := map[string]any{"status": "ok", "live": "ok", "ready": "ok", "checks": checks}
	for name, value := range h.Info {
		doc[name] = value
	}
	for _, v := range checks {
		if !v.OK && doc[v.Of] == "ok" {
			doc[v.Of], doc["status"], status = v.Name+": "+v.Error, "failing", http.StatusServiceUnavailable
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(doc)
}

// Metrics.

// Metric is one family of /metrics. Neither its name nor its labels ever come from
// a request that nobody has authenticated.
type Metric struct {
	Name, Kind, Help string // Kind is counter, gauge, histogram or summary

	Collect func(sampler) // calls it for each value
}

// sampler takes one value of a family: suffix follows its name, and labels, such as
// reason="size", may be empty.
type sampler func(suffix, labels string, value float64)

// exposition is the Prometheus text format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
func (h *Health) exposition() string {
	var b strings.Builder
	for _, m := range slices.Concat(h.Metrics, processMetrics) {
		told := false
		m.Collect(func(suffix, labels string, value float64) {
			if !told {
				fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", m.Name, m.Help, m.Name, m.Kind)
				told = true
			}
			if labels != "" {
				labels = "{" + labels + "}"
			}
			b.WriteString(m.Name + suffix + labels + " " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
		})
	}
	return b.String()
}

// began is about when the process did.
var began = time.Now()

// processMetrics have the names of Prometheus' own Go client, so that the usual
// dashboards fill. What this system does not tell is left out.
var processMetrics = []Metric{
	procMetric("process_cpu_seconds_total", "counter", "CPU time, user and system, in seconds.", 1.0/clockTicks, 11, 12),
	procMetric("process_resident_memory_bytes", "gauge", "Memory in RAM, in bytes.", float64(os.Getpagesize()), 21),
	procMetric("process_virtual_memory_bytes", "gauge", "Virtual memory, in bytes.", 1, 20),
	{"process_open_fds", "gauge", "Open file descriptors.", func(sample sampler) {
		if list, err := os.ReadDir("/proc/self/fd"); err == nil {
			sample("", "", float64(len(list)))
		}
	}},
	{"process_max_fds", "gauge", "Most open file descriptors.", func(sample sampler) {
		limits, _ := os.ReadFile("/proc/self/limits")
		_, rest, _ := strings.Cut(string(limits), "Max open files")
		if most, err := strconv.ParseFloat(append(strings.Fields(rest), "")[0], 64); err == nil {
			sample("", "", most)
		}
	}},
	{"process_start_time_seconds", "gauge", "When the process began, in seconds since 1970.", one(func() float64 { return float64(began.UnixMilli()) / 1e3 })},
	{"go_info", "gauge", "The Go version.", func(sample sampler) {
		sample("", fmt.Sprintf("version=%q", runtime.Version()), 1)
	}},
	{"go_gc_duration_seconds", "summary", "Pauses of the collector.", func(sample sampler) {
		stats := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
		debug.ReadGCStats(&stats)
		for i, pause := range stats.PauseQuantiles {
			sample("", fmt.Sprintf(`quantile="%g"`, float64(i)/4), pause.Seconds())
		}
		sample("_sum", "", stats.PauseTotal.Seconds())
		sample("_count", "", float64(stats.NumGC))
	}},
	goMetric("go_goroutines", "gauge", "Goroutines.", "/sched/goroutines:goroutines"),
	goMetric("go_threads", "gauge", "Threads.", "/sched/threads/total:threads"),
	goMetric("go_sched_gomaxprocs_threads", "gauge", "Threads that run Go code at once.", "/sched/gomaxprocs:threads"),
	goMetric("go_gc_gomemlimit_bytes", "gauge", "The limit of Go's memory.", "/gc/gomemlimit:bytes"),
	goMetric("go_memstats_alloc_bytes", "gauge", "Bytes of objects in the heap.", "/memory/classes/heap/objects:bytes"),
	goMetric("go_memstats_alloc_bytes_total", "counter", "Bytes allocated in the heap so far.", "/gc/heap/allocs:bytes"),
	goMetric("go_memstats_mallocs_total", "counter", "Objects allocated in the heap so far.", "/gc/heap/allocs:objects", "/gc/heap/tiny/allocs:objects"),
	goMetric("go_memstats_frees_total", "counter", "Objects freed so far.", "/gc/heap/frees:objects", "/gc/heap/tiny/allocs:objects"),
	goMetric("go_memstats_heap_objects", "gauge", "Objects in the heap.", "/gc/heap/objects:objects"),
	goMetric("go_memstats_heap_alloc_bytes", "gauge", "Bytes of objects in the heap.", "/memory/classes/heap/objects:bytes"),
	goMetric("go_memstats_heap_inuse_bytes", "gauge", "Bytes of the heap in use.", "/memory/classes/heap/objects:bytes", "/memory/classes/heap/unused:bytes"),
	goMetric("go_memstats_heap_idle_bytes", "gauge", "Bytes of the heap not in use.", "/memory/classes/heap/free:bytes", "/memory/classes/heap/released:bytes"),
	goMetric("go_memstats_heap_released_bytes", "gauge", "Bytes of the heap given back to the system.", "/memory/classes/heap/released:bytes"),
	goMetric("go_memstats_heap_sys_bytes", "gauge", "Bytes of the heap.", "/memory/classes/heap/objects:bytes", "/memory/classes/heap/unused:bytes",
		"/memory/classes/heap/free:bytes", "/memory/classes/heap/released:bytes"),
	goMetric("go_memstats_stack_inuse_bytes", "gauge", "Bytes of stacks.", "/memory/classes/heap/stacks:bytes"),
	goMetric("go_memstats_next_gc_bytes", "gauge", "Bytes of the heap at which the collector runs next.", "/gc/heap/goal:bytes"),
	goMetric("go_memstats_sys_bytes", "gauge", "Bytes taken from the system.", "/memory/classes/total:bytes"),
}

// one is Metric.Collect of a single value.
func one(value func() float64) func(sampler) {
	return func(sample sampler) { sample("", "", value()) }
}

// clockTicks is what /proc counts a second in: USER_HZ, 100 on every Linux
// (https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html).
const clockTicks = 100

// procMetric is the sum of fields of /proc/self/stat, counted from the third.
func procMetric(name, kind, help string, scale float64, fields ...int) Metric {
	return Metric{name, kind, help, func(sample sampler) {
		line, _ := os.ReadFile("/proc/self/stat")
		stat := strings.Fields(string(line[bytes.LastIndexByte(line, ')')+1:])) // the command before may have spaces
		sum := 0.0
		for _, i := range fields {
			if i >= len(stat) {
				return
			}
			n, _ := strconv.ParseFloat(stat[i], 64)
			sum += n
		}
		sample("", "", sum*scale)
	}}
}

// goMetric is the sum of values of runtime/metrics.
func goMetric(name, kind, help string, of ...string) Metric {
	return Metric{name, kind, help, func(sample sampler) {
		values, sum := make([]metrics.Sample, len(of)), uint64(0)
		for i := range of {
			values[i].Name = of[i]
		}
		metrics.Read(values)
		for _, v := range values {
			if v.Value.Kind() != metrics.KindUint64 {
				return
			}
			sum += v.Value.Uint64()
		}
		sample("", "", float64(sum))
	}}
}

// What people see.

// Journal keeps the latest entries, whatever they are, and how many ended in the
// last ten minutes, and how soon. The zero value is ready; it is safe for
// concurrent use.
type Journal[E any] struct {
	mu sync.Mutex

	// Guarded by mu.
	last    uint64                 // number of the newest entry
	entries [journalSize]E         // by number
	points  [seriesSize + 1]points // by time; one is under way
}

// points is one step of the plots.
type points struct {
	step          int64 // Unix time by seriesStep
	ended, failed int
	took          [4 * 32]uint32 // by duration: four to each power of two, from a microsecond up
}

// Put keeps entry in place of number n, unless that is gone already, or as a new
// one when n is 0; it returns its number.
func (j *Journal[E]) Put(n uint64, entry E) uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	if n == 0 {
		j.last++
		n = j.last
	}
	if j.last-n < journalSize {
		j.entries[n%journalSize] = entry
	}
	return n
}

// Count counts one that has ended now.
func (j *Journal[E]) Count(took time.Duration, failed bool) {
	step := time.Now().Unix() / seriesStep
	of := max(0, min(int(4*math.Log2(float64(max(took.Microseconds(), 1)))), 4*32-1))
	j.mu.Lock()
	defer j.mu.Unlock()
	p := &j.points[step%int64(len(j.points))]
	if p.step != step {
		*p = points{step: step}
	}
	p.ended++
	if failed {
		p.failed++
	}
	p.took[of]++
}

// latest is what is kept, the newest first.
func (j *Journal[E]) latest() any {
	j.mu.Lock()
	defer j.mu.Unlock()
	list := []E{}
	for n := j.last; n > 0 && j.last-n < journalSize; n-- {
		list = append(list, j.entries[n%journalSize])
	}
	return list
}

// series is what the plots show: the last whole steps.
type series struct {
	Step     int        `json:"step"`  // seconds
	Until    int64      `json:"until"` // Unix time of the end of the last one
	Webhooks []int      `json:"webhooks"`
	Failures []int      `json:"failures"`
	P50      []*float64 `json:"p50"` // milliseconds; null where none ended
	P99      []*float64 `json:"p99"`
}

func (j *Journal[E]) series(now time.Time) series {
	j.mu.Lock()
	defer j.mu.Unlock()
	last := now.Unix()/seriesStep - 1
	s := series{Step: seriesStep, Until: (last + 1) * seriesStep}
	for step := last - seriesSize + 1; step <= last; step++ {
		p := &j.points[step%int64(len(j.points))]
		if p.step != step {
			p = &points{}
		}
		s.Webhooks, s.Failures = append(s.Webhooks, p.ended), append(s.Failures, p.failed)
		s.P50, s.P99 = append(s.P50, p.quantile(.5)), append(s.P99, p.quantile(.99))
	}
	return s
}

// quantile is about how many milliseconds the share q took at most.
func (p *points) quantile(q float64) *float64 {
	seen := 0
	for i, n := range p.took {
		if seen += int(n); n > 0 && float64(seen) >= q*float64(p.ended) {
			ms := math.Round(math.Exp2((float64(i)+.5)/4)) / 1e3
			return &ms
		}
	}
	return nil
}

// document is what the page shows, in JSON, but for the time, which would make
// each one another.
type document []byte

// at is the whole document.
func (d document) at(now time.Time) []byte {
	return append(fmt.Appendf(nil, `{"now":%q,`, now.UTC().Format(time.RFC3339Nano)), d[1:]...)
}

// status is what is to be seen now.
func (h *Health) status() document {
	doc := map[string]any{
		"started": began.UTC(), "checks": h.noted(), "webhooks": h.Journal.latest(), "series": h.Journal.series(time.Now()),
		h.Info["role"]: h.State(),
	}
	for name, value := range h.Info {
		doc[name] = value
	}
	data, err := json.Marshal(doc)
	if err != nil { // nothing in it can fail
		panic(err)
	}
	return data
}

// serveEvents sends the document to a page, again and again, until that is gone.
func (h *Health) serveEvents(w http.ResponseWriter, r *http.Request) {
	defer h.viewers.Add(-1)
	if h.viewers.Add(1) > viewersLimit {
		http.Error(w, "too many pages are open", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	control := http.NewResponseController(w)
	look := time.NewTicker(viewInterval)
	defer look.Stop()
	var seen document
	var sent time.Time
	for {
		if doc := h.status(); !bytes.Equal(doc, seen) || time.Since(sent) >= viewLonely {
			seen, sent = doc, time.Now()
			control.SetWriteDeadline(sent.Add(viewTimeout))
			fmt.Fprintf(w, "data: %s\n\n", doc.at(sent))
			if control.Flush() != nil {
				return
			}
		}
		select {
		case <-look.C:
		case <-r.Context().Done():
			return
		}
	}
}

// pageHeader is the header of every answer. The page may run and show what it
// brings along and nothing else (https://www.w3.org/TR/CSP3/).
var pageHeader = map[string]string{
	"Cache-Control":                "no-store",
	"Content-Security-Policy":      "default-src 'none'; style-src " + digest(pageStyle) + "; script-src " + digest(pageScript) + "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Referrer-Policy":              "no-referrer",
	"X-Content-Type-Options":       "nosniff",
}

// digest is a source expression for text.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// The page: one document without anything from outside. What it shows goes in as
// text, never as markup.
const page = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Webhook Relay</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none' stroke='%236b82f0' stroke-width='2'%3E%3Ccircle cx='3.5' cy='11' r='2.5'/%3E%3Ccircle cx='12.5' cy='11' r='2.5'/%3E%3Cpath d='M3.5 8.5a4.5 4.5 0 0 1 9 0'/%3E%3C/svg%3E">
<style>` + pageStyle + `</style>
<header class="bar">
  <h1>Webhook Relay <span id="role"></span></h1>
  <p class="dim push" id="up"></p>
  <p id="link" class="state wait">connecting</p>
</header>
<noscript><p>This page needs JavaScript. The same facts are in <a href="status">status</a> as JSON.</p></noscript>
<p id="spoken" class="unseen" role="status"></p>
<p id="banner" hidden></p>
<main id="main" hidden>
  <section aria-label="Checks"><ul id="checks" class="grid"></ul></section>
  <section class="of-server grid tiles" aria-label="Totals">
    <dl class="card"><dt>streams</dt><dd id="streams-total"></dd></dl>
    <dl class="card"><dt>channels</dt><dd id="channels-total"></dd></dl>
    <dl class="card"><dt>webhooks held</dt><dd id="held"></dd></dl>
    <dl class="card"><dt>bytes held</dt><dd id="held-bytes"></dd>
      <dd class="meter" id="meter" role="meter" aria-label="held part of the budget" aria-valuemax="100"><div></div></dd>
      <dd class="dim" id="budget"></dd></dl>
  </section>
  <section class="of-client"><h2>Streams</h2><div id="streams" class="grid"></div></section>
  <section class="grid" aria-label="The last ten minutes">
    <figure class="card" id="rates"><figcaption>Webhooks <span class="dim">per second</span></figcaption>
      <div class="bar legend"><span class="webhooks"></span><span class="failures"></span></div>
      <div class="plot"><div></div><svg viewBox="0 0 600 120" preserveAspectRatio="none" role="img">
        <path class="rule"/><path class="webhooks"/><path class="failures"/></svg></div>
      <div class="axis"><span>10 min ago</span><span class="when"></span><span>now</span></div></figure>
    <figure class="card" id="latencies"><figcaption>Latency <span class="dim">in milliseconds</span></figcaption>
      <div class="bar legend"><span class="p50"></span><span class="p99"></span></div>
      <div class="plot"><div></div><svg viewBox="0 0 600 120" preserveAspectRatio="none" role="img">
        <path class="rule"/><path class="p99"/><path class="p50"/></svg></div>
      <div class="axis"><span>10 min ago</span><span class="when"></span><span>now</span></div></figure>
  </section>
  <section class="of-server">
    <h2>Channels</h2>
    <p class="card" id="nobody">No client is connected. Start one with <code>RELAY_MODE=client</code> and
      <code>SOURCE_URL=https://{this relay}/subscribe/{channel}/</code></p>
    <div class="card list" id="channels" tabindex="0" role="group" aria-label="Channels and their subscribers">
      <table><thead><tr><th class="client">channel, client</th><th class="since">connected for</th><th class="waiting">waiting</th><th class="addr">address</th></tr></thead>
        <tbody id="subscribers"></tbody></table></div>
    <p class="dim" id="more"></p>
  </section>
  <section>
    <div class="bar"><h2>Webhooks</h2><span class="dim push" id="count"></span>
      <input id="find" type="search" placeholder="find" aria-label="find webhooks"><button id="pause" aria-pressed="false">Pause</button></div>
    <p class="card" id="none"><span></span> <code></code></p>
    <div class="card list" id="list"><table><thead><tr id="columns"></tr></thead><tbody id="webhooks"></tbody></table></div>
  </section>
</main>
<script>` + pageScript + `</script>
</html>
`

const pageStyle = `
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #fff; --text: #1d2125; --dim: #5c656f; --line: #e2e2dd;
  --accent: #3f5bd8; --good: #1c7a3a; --bad: #c0272d; --wait: #8f5f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121416; --card: #1a1d20; --text: #d5d9de; --dim: #98a0aa; --line: #2c3137;
    --accent: #8b9ff5; --good: #5dbd78; --bad: #f5827a; --wait: #d6a546;
  }
}
*, ::before { box-sizing: border-box; margin: 0; padding: 0; }
body {
  max-width: 80rem; margin: auto; padding: 1.25rem clamp(.75rem, 3vw, 2rem) 5rem; background: var(--page); color: var(--text);
  font: .875rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
section { margin-top: 1.5rem; }
h1 { font-size: 1.25rem; } h1 span { color: var(--accent); }
h2, h3 { font-size: .9375rem; } h2 { margin-bottom: .5rem; }
code, .code { font: .8125rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.whole { user-select: all; }
.dim, dt, th { color: var(--dim); font-weight: normal; }
.bar { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; }
.push { margin-right: auto; }
.card { padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.card:has(.state.bad):not(.list) { border-color: var(--bad); }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); list-style: none; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.tiles dt + dd { font-size: 1.5rem; line-height: 1.3; }
.facts { display: grid; grid-template-columns: auto 1fr; gap: 0 1rem; margin: .25rem 0; }
.meter { height: .375rem; margin-top: .25rem; background: var(--line); border-radius: 1rem; overflow: hidden; }
.meter div { height: 100%; background: var(--accent); } .meter .full { background: var(--bad); }
input, button {
  padding: .125rem .625rem; margin-bottom: .5rem; font: inherit; color: inherit; background: var(--card); border: 1px solid var(--dim); border-radius: .375rem;
}
input { width: 8rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
[hidden], [data-role=server] .of-client, [data-role=client] .of-server { display: none !important; }

/* A state is a word, a colour and a shape: a dot, a diamond when it is bad, a ring otherwise. */
.good { color: var(--good); } .wait { color: var(--wait); } .bad { color: var(--bad); }
.state::before {
  content: ""; display: inline-block; width: .5625rem; height: .5625rem; margin-right: .4375rem; border: 2px solid; border-radius: 50%;
}
.good::before, .bad::before { background: currentColor; }
.bad::before { border-radius: 0; transform: rotate(45deg) scale(.85); }

/* What is old stays readable, and looks it. */
.stale main { opacity: .85; filter: grayscale(1); }
#banner { position: fixed; z-index: 1; inset: auto 0 0; padding: .625rem 1rem; text-align: center; background: var(--card); border-top: 3px solid var(--bad); }

/* Plots: the drawing is stretched to its box, so the words are HTML beside it. */
.plot { position: relative; height: 7.5rem; margin: .75rem 0 .375rem 3.25rem; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; right: calc(100% + .5rem); transform: translateY(-50%); white-space: nowrap; }
.plot span, .axis { color: var(--dim); font-size: .75rem; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.plot .rule { stroke: var(--line); stroke-width: 1; }
.plot .webhooks { fill: var(--accent); } .plot .failures { fill: var(--bad); }
.plot .p50 { stroke: var(--accent); } .plot .p99 { stroke: var(--dim); stroke-width: 1.25; }
.axis { display: flex; justify-content: space-between; margin-left: 3.25rem; }
.legend span::before { content: ""; display: inline-block; width: .75rem; height: .25rem; margin-right: .375rem; vertical-align: middle; background: var(--accent); }
.legend .failures::before { background: var(--bad); } .legend .p99::before { background: var(--dim); height: .125rem; }

table { width: 100%; border-collapse: collapse; table-layout: fixed; }
.list { padding: 0 .5rem; overflow: auto; }
#channels { max-height: 30rem; }
th, td { padding: .3125rem .5rem; text-align: left; vertical-align: baseline; }
tbody tr { border-top: 1px solid var(--line); }
.head .client { font-weight: 600; }
/* What is cut here is whole in its title; an id is also copied whole. */
td div { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; }
.outcome div { display: inline; }
.event div, .method div { display: block; text-overflow: ellipsis; white-space: nowrap; }
th.method, th.status { width: 4.5rem; } th.bytes, th.attempt, th.ms { width: 5.25rem; } th.time { width: 6.5rem; }
th.channel, th.since, th.waiting { width: 9rem; } th.event { width: 10rem; } th.outcome { width: 11.5rem; } th.addr { width: 17rem; }
@media (min-width: 60.01rem) { .bytes, .status, .attempt, .ms { text-align: right; } }
@media (max-width: 60rem) { /* A row becomes a small stack. */
  thead { position: absolute; clip-path: inset(50%); }
  tbody tr { display: flex; flex-wrap: wrap; gap: 0 .875rem; padding: .5rem; }
  tr::before, tr:not(.head)::after { content: ""; flex-basis: 100%; order: 2; } /* line breaks */
  tr::after { order: 4 !important; }
  td { padding: 0; max-width: 100%; order: 5; color: var(--dim); }
  td:has(div:empty) { display: none; }
  td.outcome, td.status { order: 0; }
  td.time { order: 1; margin-left: auto; }
  td.method, td.path, td.client { order: 3; }
  td.path, td.client { flex: 1; }
  td.method { max-width: 6rem; }
  td.path, td.client, td.method, td.status { color: var(--text); }
  td.good { color: var(--good); } td.wait { color: var(--wait); } td.bad { color: var(--bad); }
  td.since div::before { content: "for "; } td.attempt div::before { content: "attempt "; } td.ms div::after { content: " ms"; }
  tr:not(.head) td.waiting div::after { content: " waiting"; }
}
`

const pageScript = `
'use strict';
// The page shows one document, the same as /status; the event stream brings a whole new one whenever something changes.
// Channels, paths and names come from outside. They go in as text and titles alone, which are never markup.

const $ = id => document.getElementById(id);
let doc, webhooks = [], paused = false; // webhooks: those of the document, or of the one before the pause

function el(tag, className = '', ...children) {
  const e = document.createElement(tag);
  e.className = className;
  e.append(...children);
  return e;
}

// put touches only what differs: what is selected, hovered or read aloud stays.
function put(e, text, title = '', className = e.className) {
  text = String(text ?? '');
  if (e.textContent !== text) e.textContent = text;
  if (e.title !== title) e.title = title;
  if (e.className !== className) e.className = className;
}

// keyed gives parent one child for each item, in their order. The element of an item that was there before stays, and
// is not moved, so that nothing flickers and the scroll position holds.
const kept = new WeakMap();
function keyed(parent, items, keyOf, make, fill) {
  const old = kept.get(parent) || new Map(), now = new Map();
  for (const item of items || []) {
    let key = keyOf(item);
    while (now.has(key)) key += '+';
    now.set(key, old.get(key) || make());
    fill(now.get(key), item);
  }
  for (const [key, e] of old) if (!now.has(key)) e.remove();
  let place = parent.firstElementChild;
  for (const e of now.values()) {
    if (e === place) place = e.nextElementSibling;
    else parent.insertBefore(e, place);
  }
  kept.set(parent, now);
}

const makeRow = n => () => el('tr', '', ...Array.from({length: n}, () => el('td', '', el('div'))));
function fillRow(row, cells) { // of [class, text, title]
  cells.forEach(([className, text, title], i) => {
    put(row.cells[i].firstChild, text, title);
    if (row.cells[i].className !== className) row.cells[i].className = className;
  });
}

// Ages are between two times of the server: the browser's clock may be wrong.
const age = time => span(Date.parse(doc.now) - Date.parse(time));
function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 100 ? s + ' s' : s < 6000 ? Math.round(s / 60) + ' min' : s < 172800 ? Math.round(s / 3600) + ' h' : Math.round(s / 86400) + ' d';
}
const utc = (ms, from, to) => new Date(ms).toISOString().slice(from, to).replace('T', ' ') + ' UTC';
const number = n => (n || 0).toLocaleString('en');
const plural = (n, one) => number(n) + ' ' + one + (n === 1 ? '' : 's');
const millis = ms => ms == null ? '' : ms < 10 ? String(+ms.toFixed(1)) : number(Math.round(ms));
function bytes(n) {
  let unit = 0;
  for (n ||= 0; n >= 1024 && unit < 3; unit++) n /= 1024;
  return (n < 100 ? +n.toFixed(1) : Math.round(n)) + ' ' + ['B', 'KiB', 'MiB', 'GiB'][unit];
}

// ---- checks, totals, streams, channels

const makeCheck = () => el('li', 'card', el('div', 'bar', el('b'), el('span'), el('span', 'dim')), el('div'));
function fillCheck(e, check) {
  const [name, state, of] = e.firstChild.children;
  put(name, check.name);
  put(state, (check.ok ? 'ok for ' : 'failing for ') + age(check.since), check.since, check.ok ? 'state good' : 'state bad');
  put(of, check.of && 'part of /' + check.of);
  fillError(e.lastChild, check, check.ok);
}
function fillError(e, {error, errorAt}, past) {
  put(e, error && (past ? 'last error ' : '') + age(errorAt) + ' ago: ' + error, errorAt, past ? 'dim' : 'bad');
}

function fillTotals({streams, channels, held}) {
  const percent = held.limit ? Math.min(100, 100 * held.bytes / held.limit) : 0, meter = $('meter');
  put($('streams-total'), number(streams));
  put($('channels-total'), number(channels));
  put($('held'), number(held.webhooks));
  put($('held-bytes'), bytes(held.bytes), plural(held.bytes, 'byte'));
  put($('budget'), Math.round(percent) + ' % of ' + bytes(held.limit));
  meter.ariaValueNow = percent;
  meter.firstChild.style.width = percent + '%';
  meter.firstChild.className = percent > 80 ? 'full' : '';
}

const makeStream = () => el('article', 'card', el('div', 'bar', el('h3', 'push'), el('span')), el('dl', 'facts',
  ...['source', 'target', 'webhook URL', 'forwards', 'retries'].flatMap((name, i) => [el('dt', '', name), el('dd', i < 3 ? 'code whole' : '')])), el('div'));
function fillStream(e, stream) {
  const [head, facts, error] = e.children;
  put(head.firstChild, stream.channel);
  put(head.lastChild, stream.state + ' for ' + age(stream.since), stream.since, {ready: 'state good', waiting: 'state bad'}[stream.state] || 'state wait');
  const values = [stream.source, stream.target, stream.webhooks,
    number(stream.forwards) + ' under way, ' + number(stream.waiting) + ' waiting for a retry', number(stream.retries)];
  facts.querySelectorAll('dd').forEach((dd, i) => put(dd, values[i]));
  fillError(error, stream, stream.state === 'ready');
}

function fillChannels({streams, channels, list}) {
  const rows = (list || []).flatMap(c => [{...c, head: true}, ...(c.subscribers || []).map(s => ({...s, channel: c.channel}))]);
  keyed($('subscribers'), rows, r => JSON.stringify([r.channel, r.client, r.addr, r.since]), makeRow(4), (row, r) => {
    row.className = r.head ? 'head' : '';
    fillRow(row, r.head
      ? [['client', r.channel], ['since', ''], ['waiting', r.held ? plural(r.held, 'webhook') + ' held' : ''], ['addr', r.subscribers?.length ? '' : 'no subscribers']]
      : [['client', r.client || 'a client without a name'], ['since', age(r.since), r.since], ['waiting', bytes(r.waiting), plural(r.waiting, 'byte')], ['addr code', r.addr]]);
  });
  const shown = rows.filter(r => r.head).length, more = [[channels - shown, 'channel'], [streams - (rows.length - shown), 'stream']];
  put($('more'), more.filter(([n]) => n > 0).map(([n, one]) => 'and ' + number(n) + ' more ' + one + (n > 1 ? 's' : '')).join(', '));
  $('nobody').hidden = shown > 0;
  $('channels').hidden = !shown;
}

// ---- webhooks

const kinds = {accepted: 'good', answered: 'good', forwarded: 'good', held: 'wait', forwarding: 'wait', refused: 'bad', lost: 'bad', failed: 'bad'};
const names = ['time', 'channel', 'method', 'path', 'bytes', 'outcome', 'status', 'attempt', 'ms', 'event'];
const cellsOf = w => [
  ['time', age(w.time) + ' ago', w.time],
  ['channel', w.channel, w.channel],
  ['method', w.method, w.method],
  ['path code', w.path, w.path],
  ['bytes', bytes(w.bytes), plural(w.bytes || 0, 'byte')],
  ['outcome state ' + (w.outcome === 'answered' && w.status >= 400 ? 'bad' : kinds[w.outcome] || ''), w.outcome + (w.reason ? ': ' + w.reason : '')],
  [w.status >= 400 ? 'status bad' : 'status', w.status || ''],
  ['attempt of-client', w.attempt || ''],
  ['ms', millis(w.ms)],
  ['event code whole', w.event, w.event],
];
for (const name of names) $('columns').append(el('th', name === 'attempt' ? 'attempt of-client' : name, name));

function fillWebhooks() {
  if (!paused) webhooks = doc.webhooks || [];
  const all = webhooks.length, word = $('find').value.trim().toLowerCase();
  const list = webhooks.filter(w => !word || cellsOf(w).some(([, text]) => String(text).toLowerCase().includes(word)));
  keyed($('webhooks'), list, w => w.time + ' ' + w.event, makeRow(names.length), (row, w) => fillRow(row, cellsOf(w)));
  put($('count'), all ? (word ? list.length + ' of ' : '') + 'the last ' + all : '');
  $('list').hidden = !list.length;
  $('none').hidden = list.length > 0;
  const first = (doc.client?.streams || doc.server?.list)?.[0], url = first?.webhooks || 'https://{this relay}/webhooks/' + (first?.channel || '{channel}');
  put($('none').firstChild, all ? 'None of them has this.' : 'No webhooks yet. Send one:');
  put($('none').lastChild, all ? '' : 'curl -d hello ' + url + '/');
}
$('find').oninput = fillWebhooks;
$('pause').onclick = () => {
  $('pause').ariaPressed = paused = !paused;
  put($('pause'), paused ? 'Resume' : 'Pause');
  fillWebhooks();
};

// ---- plots

// makePlot draws into a box of 600 by 120, ten for each step. The legend tells the last values, or those at the pointer.
// scale gives the rules to draw, and from where to where a value lies.
function makePlot(figure, names, shape, scale) {
  const find = selector => figure.querySelector(selector), box = find('.plot'), caption = find('figcaption').textContent;
  let lines, pointed, timeOf;
  const legend = () => names.map((name, i) => {
    const value = lines[i][pointed ?? lines[i].findLastIndex(v => v != null)], text = name + ' ' + (millis(value) || 'none');
    put(find('.legend .' + name), text);
    put(find('.when'), pointed == null ? '' : timeOf(pointed));
    return text;
  }).join(', ');
  box.onpointermove = event => {
    const {left, width} = box.getBoundingClientRect();
    pointed = Math.max(0, Math.min(59, Math.floor((event.clientX - left) / width * 60)));
    if (lines) legend();
  };
  box.onpointerleave = () => { pointed = null; legend(); };
  return (series, values) => {
    lines = values;
    timeOf = i => utc((series.until - (60 - i) * series.step) * 1000, 11, 19);
    const {rules, at} = scale(lines.flat().filter(v => v > 0)), y = v => 120 - 120 * Math.min(1, Math.max(0, at(v)));
    find('.rule').setAttribute('d', rules.map(v => 'M0 ' + y(v) + 'H600').join(''));
    keyed(box.firstChild, rules, String, () => el('span'), (e, v) => { put(e, millis(v)); e.style.top = y(v) / 1.2 + '%'; });
    names.forEach((name, i) => find('path.' + name).setAttribute('d', lines[i].map((v, x) => v == null ? '' : shape(x, y(v), lines[i][x - 1] != null)).join('')));
    find('svg').ariaLabel = caption + ', last ten minutes; latest: ' + legend();
  };
}
const bars = (x, y) => y < 120 ? 'M' + (x * 10 + 1) + ' 120V' + y + 'h8V120z' : '';
// A line goes on from the step before; a step alone is a dash.
const line = (x, y, on) => on ? 'L' + (x * 10 + 5) + ' ' + y : 'M' + (x * 10 + 1) + ' ' + y + 'h8';
const rates = makePlot($('rates'), ['webhooks', 'failures'], bars, values => {
  const top = Math.max(1, ...values), power = 10 ** Math.floor(Math.log10(top)), most = power * [1, 2, 3, 4, 6, 8, 10].find(n => n * power >= top);
  return {rules: [0, most / 2, most], at: v => v / most};
});
// Latencies spread over decades; on a linear scale, p50 would lie on the floor.
const latencies = makePlot($('latencies'), ['p50', 'p99'], line, values => {
  const from = Math.max(-1, Math.floor(Math.log10(Math.min(...values, 1)))), to = Math.max(1, Math.ceil(Math.log10(Math.max(...values, 10))));
  return {rules: Array.from({length: to - from + 1}, (_, i) => 10 ** (from + i)), at: v => (Math.log10(v) - from) / (to - from)};
});

// ---- the document and its stream

function render() {
  const {series} = doc, failing = (doc.checks || []).filter(c => !c.ok).map(c => c.name);
  document.body.dataset.role = doc.role;
  put($('role'), doc.role);
  put($('up'), 'version ' + doc.version + ', up for ' + age(doc.started) + ', since ' + utc(doc.started, 0, 16), doc.started);
  keyed($('checks'), doc.checks, c => c.name + ' ' + c.of, makeCheck, fillCheck);
  if (doc.server) {
    fillTotals(doc.server);
    fillChannels(doc.server);
  }
  if (doc.client) keyed($('streams'), doc.client.streams, s => s.channel + ' ' + s.source, makeStream, fillStream);
  rates(series, [series.webhooks, series.failures].map(counts => counts.map(n => n / series.step)));
  latencies(series, [series.p50, series.p99]);
  fillWebhooks();
  $('main').hidden = false;
  say(failing.length ? 'failing: ' + failing.join(', ') : '');
}

// say is for the eyes that are elsewhere: the tab's title, and screen readers, which tell only what is new.
function say(trouble) {
  put($('spoken'), trouble || 'connected, all checks are ok');
  document.title = (trouble && trouble + ' · ') + 'Webhook Relay ' + (doc?.role || '');
}

let source, timer, heard, lively; // heard: when the last document came; lively: that, or the last try
function connect() {
  lively = Date.now();
  source = new EventSource('events');
  source.onmessage = message => {
    heard = lively = Date.now();
    doc = JSON.parse(message.data);
    document.body.className = '';
    $('banner').hidden = true;
    put($('link'), 'connected', '', 'state good');
    render();
  };
  source.onerror = reconnect;
}
// An EventSource comes back by itself after a cut, but never after an answer that is not 200, as a balancer gives, and a
// connection that only went silent is no error to it: so it is always replaced. A document comes at least every five seconds.
function reconnect() {
  source.close();
  clearTimeout(timer);
  timer = setTimeout(connect, 2000);
  document.body.className = 'stale';
  put($('link'), 'disconnected', '', 'state bad');
  say('disconnected');
  tell();
}
function tell() {
  $('banner').hidden = false;
  put($('banner'), doc ? 'Disconnected for ' + span(Date.now() - heard) + ': this is the state of ' + utc(doc.now, 11, 19) + '. Trying again.' : 'Not connected yet. Trying again.');
}
setInterval(() => {
  if (source.readyState !== EventSource.CLOSED && Date.now() - lively > 15000) reconnect();
  if (document.body.className) tell();
}, 1000);
connect();
`
