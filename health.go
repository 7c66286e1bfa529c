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
	Name  string
	Ready bool // /ready asks for it; otherwise /live does

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
	Journal *Journal

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
		h.look(ctx, func(Check) bool { return true })
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
		h.probe(w, r, false)
	case "/ready":
		h.probe(w, r, true)
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

// look asks the checks that are wanted, and returns why one does not hold.
func (h *Health) look(ctx context.Context, wanted func(Check) bool) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	for i, check := range h.Checks {
		if !wanted(check) {
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
	for len(h.verdicts) < len(h.Checks) {
		of := map[bool]string{false: "live", true: "ready"}[h.Checks[len(h.verdicts)].Ready]
		h.verdicts = append(h.verdicts, verdict{Name: h.Checks[len(h.verdicts)].Name, Of: of, OK: true, Since: now})
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

func (h *Health) probe(w http.ResponseWriter, r *http.Request, ready bool) {
	if err := h.look(r.Context(), func(c Check) bool { return c.Ready == ready }); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ok\n")
}

// summary is all checks and the facts in JSON; 503 when one check fails.
func (h *Health) summary(w http.ResponseWriter, r *http.Request) {
	doc := map[string]any{"status": "ok"}
	for name, value := range h.Info {
		doc[name] = value
	}
	status := http.StatusOK
	for name, ready := range map[string]bool{"live": false, "ready": true} {
		doc[name] = "ok"
		if err := h.look(r.Context(), func(c Check) bool { return c.Ready == ready }); err != nil {
			doc[name], doc["status"], status = err.Error(), "failing", http.StatusServiceUnavailable
		}
	}
	doc["checks"] = h.noted()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(doc)
}

// Metrics.

// Metric is one family of /metrics. Neither its name nor its labels ever come from
// a request that nobody has authenticated.
type Metric struct {
	Name, Kind, Help string // Kind is counter, gauge, histogram or summary

	// Collect calls sample for each value: suffix follows the name, and labels, such
	// as reason="size", may be empty.
	Collect func(sample func(suffix, labels string, value float64))
}

// exposition is the Prometheus text format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
func (h *Health) exposition() string {
	var b strings.Builder
	for _, m := range append(h.Metrics, processMetrics...) {
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
	procMetric("process_cpu_seconds_total", "counter", "CPU time, user and system, in seconds.", func(stat []string) (float64, bool) {
		user, err := strconv.ParseFloat(stat[11], 64)
		system, err2 := strconv.ParseFloat(stat[12], 64)
		return (user + system) / clockTicks, err == nil && err2 == nil
	}),
	procMetric("process_resident_memory_bytes", "gauge", "Memory in RAM, in bytes.", func(stat []string) (float64, bool) {
		pages, err := strconv.ParseFloat(stat[21], 64)
		return pages * float64(os.Getpagesize()), err == nil
	}),
	procMetric("process_virtual_memory_bytes", "gauge", "Virtual memory, in bytes.", func(stat []string) (float64, bool) {
		size, err := strconv.ParseFloat(stat[20], 64)
		return size, err == nil
	}),
	procMetric("process_open_fds", "gauge", "Open file descriptors.", func([]string) (float64, bool) {
		list, err := os.ReadDir("/proc/self/fd")
		return float64(len(list)), err == nil
	}),
	procMetric("process_max_fds", "gauge", "Most open file descriptors.", func([]string) (float64, bool) {
		limits, _ := os.ReadFile("/proc/self/limits")
		_, rest, _ := strings.Cut(string(limits), "Max open files")
		fields := append(strings.Fields(rest), "")
		most, err := strconv.ParseFloat(fields[0], 64)
		return most, err == nil
	}),
	{"process_start_time_seconds", "gauge", "When the process began, in seconds since 1970.", one(func() float64 { return float64(began.UnixMilli()) / 1e3 })},
	{"go_info", "gauge", "The Go version.", func(sample func(suffix, labels string, value float64)) {
		sample("", fmt.Sprintf("version=%q", runtime.Version()), 1)
	}},
	{"go_gc_duration_seconds", "summary", "Pauses of the collector.", func(sample func(suffix, labels string, value float64)) {
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
func one(value func() float64) func(func(suffix, labels string, value float64)) {
	return func(sample func(suffix, labels string, value float64)) { sample("", "", value()) }
}

// clockTicks is what /proc counts a second in: USER_HZ, 100 on every Linux
// (https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html).
const clockTicks = 100

// procMetric is a value of Linux: of /proc/self/stat, whose fields read is given
// from the third on, or of what stands beside it.
func procMetric(name, kind, help string, read func(stat []string) (value float64, ok bool)) Metric {
	return Metric{name, kind, help, func(sample func(suffix, labels string, value float64)) {
		line, _ := os.ReadFile("/proc/self/stat")
		stat := strings.Fields(string(line[bytes.LastIndexByte(line, ')')+1:])) // the command before may have spaces
		if len(stat) < 22 {
			return
		}
		if value, ok := read(stat); ok {
			sample("", "", value)
		}
	}}
}

// goMetric is the sum of values of runtime/metrics.
func goMetric(name, kind, help string, of ...string) Metric {
	return Metric{name, kind, help, func(sample func(suffix, labels string, value float64)) {
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
type Journal struct {
	mu      sync.Mutex
	last    uint64             // number of the newest entry; guarded by mu, like all below
	entries [journalSize]any   // by number; immutable
	points  [seriesSize]points // by time
}

// points is one step of the plots.
type points struct {
	step          int64 // Unix time by seriesStep
	ended, failed int
	took          [4 * 32]uint32 // by duration: four to each power of two, from a microsecond up
}

// Put keeps entry in place of number n, unless that is gone already, or as a new
// one when n is 0; it returns its number.
func (j *Journal) Put(n uint64, entry any) uint64 {
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
func (j *Journal) Count(took time.Duration, failed bool) {
	step := time.Now().Unix() / seriesStep
	of := max(0, min(int(4*math.Log2(float64(max(took.Microseconds(), 1)))), 4*32-1))
	j.mu.Lock()
	defer j.mu.Unlock()
	p := &j.points[step%seriesSize]
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
func (j *Journal) latest() []any {
	j.mu.Lock()
	defer j.mu.Unlock()
	list := []any{}
	for n := j.last; n > 0 && j.last-n < journalSize; n-- {
		list = append(list, j.entries[n%journalSize])
	}
	return list
}

// series is what the plots show: the last whole steps, and the one under way.
type series struct {
	Step     int        `json:"step"`  // seconds
	Until    int64      `json:"until"` // Unix time of the end of the last one
	Webhooks []int      `json:"webhooks"`
	Failures []int      `json:"failures"`
	P50      []*float64 `json:"p50"` // milliseconds; null where none ended
	P99      []*float64 `json:"p99"`
}

func (j *Journal) series(now time.Time) series {
	j.mu.Lock()
	defer j.mu.Unlock()
	last := now.Unix() / seriesStep
	s := series{Step: seriesStep, Until: (last + 1) * seriesStep}
	for step := last - seriesSize + 1; step <= last; step++ {
		p := &j.points[step%seriesSize]
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

const pageStyle = ``
const pageScript = ``
const page = "<!doctype html>"
