package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The server's fixed bounds; the package doc lists what happens at each.
const (
	headerTimeout  = 10 * time.Second       // to send a request's header
	headerLimit    = 16 << 10               // bytes of a request's header
	requestCost    = 16 << 10               // bytes that a request takes besides those it brings
	streamsAtOnce  = 50                     // requests under way on an HTTP/2 connection
	bodyTimeout    = 60 * time.Second       // to send a request's body
	replyTimeout   = 10 * time.Second       // to take an answer
	againAtOnce    = 128                    // held events that are published again; the others wait, or a bus could not keep up
	busPause       = time.Second            // before a held event is published again that the bus did not take
	takenTimeout   = 250 * time.Millisecond // for replicas to say to whom an event went
	idleTimeout    = 2 * time.Minute        // between two requests on a connection
	writeTimeout   = 60 * time.Second       // for one write to a stream: a full client may pause this long
	lastChunkTime  = time.Second            // to write the end of a stream
	liveTimeout    = 5 * time.Second        // until a new stream is subscribed on every replica
	probeTimeout   = 2 * time.Second        // for a balancer's probe
	movePatience   = 5 * time.Second        // for clients to follow a drain at shutdown
	moveJitter     = time.Second            // over which drain is spread at shutdown
	reserve        = time.Second            // of the handler timeout, kept for closing streams
	reloadInterval = 3 * time.Second        // between looks at the tokens file
	settleInterval = time.Second            // between looks at the start, while its last line is not complete
	tokensLimit    = 1 << 20                // bytes of the tokens file
	reportTime     = 10 * time.Second       // to send a report, twice what a client takes for one try
	reportLimit    = 4 << 20                // bytes of the reports of one request
	reportsLimit   = 64 << 20               // bytes of all reports that are being read
	givenLimit     = 1024                   // outcomes of one held event that are noted before its receipts
	chatterLimit   = 4 << 10                // bytes a subscriber may send after its request
	retryAfter     = "5"                    // seconds, on every 503
)

// byChannel is a setting with one default and exceptions by channel.
type byChannel[T any] struct {
	Default T
	Named   map[string]T
}

func (b byChannel[T]) of(channel string) T {
	if v, ok := b.Named[channel]; ok {
		return v
	}
	return b.Default
}

// ServerOptions configure a Server.
type ServerOptions struct {
	Replica        string // this replica's name, the beginning of its event ids
	MaxPayload     int64  // bytes of a webhook's body
	Heartbeat      time.Duration
	HeldBuffer     int64         // bytes of all held events together
	StreamMaxAge   time.Duration // 0: none
	HandlerTimeout time.Duration // for everything that Shutdown does
	Modes          byChannel[string]
	Timeouts       byChannel[time.Duration]

	Token            string // empty with an empty TokensFile: everybody may subscribe
	TokensFile       string
	SubscribeAllowed []netip.Prefix // nil: everybody
	WebhooksAllowed  []netip.Prefix // nil: everybody
	TrustedProxies   []netip.Prefix
}

// Server takes webhooks, holds streams and routes answers. It is an
// http.Handler; Run keeps its tokens fresh and Shutdown ends it.
type Server struct {
	opts ServerOptions
	log  *slog.Logger
	hub  *Hub
	bus  Bus
	keys atomic.Pointer[keyring]

	held    atomic.Int64 // bytes of all holds, and of bodies that are being read
	reports atomic.Int64 // bytes of reports that are being read

	Webhooks, Unheard, Answered, Unanswered, Heartbeats atomic.Int64
	Refused, Rejected                                   refusals // webhooks; subscribers and their reports

	draining atomic.Bool   // not ready any more, but still at work
	giveUp   chan struct{} // closed: held requests, and streams that have not begun, end with 503
	turns    chan struct{} // one token for each held event that is being published again

	mu       sync.Mutex
	left     bool             // guarded by mu: nothing new is taken
	holds    map[string]*hold // guarded by mu, by event id
	requests sync.WaitGroup   // webhooks being published or held; Add only under mu while !left
	streams  sync.WaitGroup   // goroutines of streams; likewise
	movers   sync.WaitGroup   // streams that can follow a drain; likewise
}

// NewServer wires a server to its hub and bus, and reads the tokens file.
func NewServer(opts ServerOptions, hub *Hub, bus Bus, log *slog.Logger) (*Server, error) {
	s := &Server{
		opts: opts, log: log, hub: hub, bus: bus,
		giveUp: make(chan struct{}), turns: make(chan struct{}, againAtOnce),
		holds:   map[string]*hold{},
		Refused: newRefusals(webhookReasons), Rejected: newRefusals(subscriberReasons),
	}
	keys, err := loadKeys(opts)
	for err == nil && !keys.whole { // a writer may still be at work, and half a token must open nothing
		before := keys.sum
		time.Sleep(settleInterval)
		if keys, err = loadKeys(opts); err == nil && keys.sum == before {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	s.keys.Store(keys)
	hub.OnSignal = s.signal
	return s, nil
}

// Run looks after the tokens file until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	if s.opts.TokensFile == "" {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(reloadInterval)
	defer tick.Stop()
	last, seen := "", s.keys.Load().sum
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		keys, err := loadKeys(s.opts)
		if err != nil {
			if last != err.Error() {
				s.log.Error("tokens file kept as it was", "err", err)
			}
			last = err.Error()
			continue
		}
		last = ""
		settled := keys.whole || keys.sum == seen
		seen = keys.sum
		if !settled || keys.sum == s.keys.Load().sum {
			continue
		}
		s.keys.Store(keys)
		s.log.Info("tokens file read again")
		for _, sub := range s.hub.Subscribers() {
			if !keys.allows(sub.Channel, sub.Credential) {
				s.hub.Leave(sub, errRevoked)
			}
		}
	}
}

// Check is nil while the bus works and the server is not draining.
func (s *Server) Check(ctx context.Context) error {
	if s.draining.Load() {
		return errShutdown
	}
	return s.bus.Check(ctx)
}

// Drain turns the server unready; it goes on working.
func (s *Server) Drain() { s.draining.Store(true) }

// Shutdown refuses what is new, asks clients to move, finishes what is held,
// and closes the streams, all within the handler timeout.
func (s *Server) Shutdown() {
	end := time.Now().Add(s.opts.HandlerTimeout)
	last := min(reserve, s.opts.HandlerTimeout/4)
	late := time.AfterFunc(time.Until(end)-last, func() { close(s.giveUp) })
	s.draining.Store(true)
	s.mu.Lock()
	s.left = true
	s.mu.Unlock()
	for _, sub := range s.hub.Subscribers() { // a stream that begins later asks itself, in begin
		time.AfterFunc(mathrand.N(min(moveJitter, s.opts.HandlerTimeout/4)+1), func() { s.askToMove(sub) })
	}
	select {
	case <-done(&s.requests):
	case <-time.After(time.Until(end)): // an answer is stuck in its connection, which our caller closes
	}
	select {
	case <-done(&s.movers):
	case <-time.After(movePatience):
	case <-s.giveUp:
	}
	if late.Stop() { // no request is held any more, but a stream may wait for its begin
		close(s.giveUp)
	}
	for _, sub := range s.hub.Subscribers() {
		s.hub.Finish(sub, errShutdown)
	}
	cut := time.AfterFunc(time.Until(end)-last/2, func() {
		for _, sub := range s.hub.Subscribers() {
			s.hub.Leave(sub, errOverdue)
		}
	})
	select {
	case <-done(&s.streams):
	case <-time.After(time.Until(end)): // an HTTP/2 connection takes nothing, likewise
	}
	cut.Stop()
}

// done is closed once wg is; its goroutine ends then.
func done(wg *sync.WaitGroup) <-chan struct{} {
	c := make(chan struct{})
	go func() {
		wg.Wait()
		close(c)
	}()
	return c
}

// ServeHTTP is the whole route table. It never redirects: a provider that does
// not follow would lose its webhook.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.draining.Load() || len(r.TransferEncoding) > 0 {
		// The next request goes to another replica; or what follows a chunked
		// body may be a second request, if the message had a Content-Length too
		// (RFC 9112 section 6.3): net/http does not tell.
		w.Header().Set("Connection", "close")
	}
	t, err := parseTarget(r.RequestURI)
	switch {
	case r.RequestURI == "*":
		refuse(w, errNotFound)
	case err != nil:
		refuse(w, errInvalidPath)
	case t.Kind == "webhooks" && t.Path != "/webhooks":
		s.serveWebhook(w, r, &t)
	case t.Kind == "subscribe" && t.Channel != "" && (t.Tail == "" || t.Tail == "/"):
		s.serveSubscribe(w, r, t.Channel)
	case t.Kind == "subscribe" && t.Tail == "/responses":
		s.serveReport(w, r, t.Channel)
	case t.Path == "/":
		s.serveReady(w, r)
	default:
		refuse(w, errNotFound)
	}
}

// refusal is the relay's own answer to a request: a fixed text, never the input.
type refusal struct {
	status  int
	message string
	reason  string // label of the metrics that count it
}

func (r *refusal) Error() string { return r.message }

// All that is refused, and why.
var (
	errNotFound    = &refusal{http.StatusNotFound, "not found", "path"}
	errMethod      = &refusal{http.StatusMethodNotAllowed, "method not allowed", "method"}
	errChannel     = &refusal{http.StatusBadRequest, "invalid channel", "channel"}
	errBadMethod   = &refusal{http.StatusBadRequest, "invalid method", "method"}
	errInvalidPath = &refusal{http.StatusBadRequest, "invalid path", "path"}
	errQuery       = &refusal{http.StatusBadRequest, "invalid query", "path"}
	errIncomplete  = &refusal{http.StatusBadRequest, "body incomplete", "body"}
	errUnwanted    = &refusal{http.StatusBadRequest, "no body expected", "body"}
	errFields      = &refusal{http.StatusRequestHeaderFieldsTooLarge, "too many header fields", "size"}
	errTooLarge    = &refusal{http.StatusRequestEntityTooLarge, "payload too large", "size"}
	errAddress     = &refusal{http.StatusForbidden, "address not allowed", "address"}
	errToken       = &refusal{http.StatusUnauthorized, "missing or wrong token", "token"}
	errBudget      = &refusal{http.StatusServiceUnavailable, "too many requests wait", "budget"}
	errLimit       = &refusal{http.StatusServiceUnavailable, "too many subscribers", "limit"}
	errBus         = &refusal{http.StatusServiceUnavailable, "bus unavailable", "bus"}
	errLeaving     = &refusal{http.StatusServiceUnavailable, "shutting down", "shutdown"}
	errConnection  = &refusal{http.StatusServiceUnavailable, "no stream on this connection", "connection"}
	errNobody      = &refusal{http.StatusServiceUnavailable, "nobody connected", "nobody"}
	errGone        = &refusal{http.StatusServiceUnavailable, "provider is gone", "gone"}
	errReport      = &refusal{http.StatusBadRequest, "invalid report", "body"}
	errUnreachable = &refusal{http.StatusBadGateway, "target unreachable", "unreachable"}
	errNoAnswer    = &refusal{http.StatusGatewayTimeout, "no answer in time", "timeout"}
)

// refusals counts by reason.
type refusals map[string]*atomic.Int64

// webhookReasons and subscriberReasons are all that may stand in the label.
var (
	webhookReasons    = []string{"address", "body", "budget", "bus", "channel", "method", "path", "shutdown", "size"}
	subscriberReasons = []string{"address", "body", "bus", "channel", "connection", "limit", "method", "shutdown", "token"}
)

func newRefusals(reasons []string) refusals {
	r := refusals{}
	for _, reason := range reasons {
		r[reason] = new(atomic.Int64)
	}
	return r
}

// refuse counts err and answers with it.
func (r refusals) refuse(w http.ResponseWriter, err *refusal) {
	r[err.reason].Add(1)
	refuse(w, err)
}

// refuse answers with err.
func refuse(w http.ResponseWriter, err *refusal) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	if err.status == http.StatusServiceUnavailable {
		h.Set("Retry-After", retryAfter)
	}
	w.WriteHeader(err.status)
	fmt.Fprintf(w, `{"statusCode":%d,"message":"%s"}`, err.status, err.message)
}

// serveReady is /ready of the health service, for balancers that can only
// probe the port that takes traffic.
func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
	defer cancel()
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		refuse(w, errMethod)
	case s.draining.Load():
		refuse(w, errLeaving)
	case s.Check(ctx) != nil:
		refuse(w, errBus)
	default:
		io.WriteString(w, "ok\n")
	}
}

// serveWebhook takes one webhook of a provider.
func (s *Server) serveWebhook(w http.ResponseWriter, r *http.Request, t *requestTarget) {
	s.Webhooks.Add(1)
	if err := s.admitWebhook(r, t); err != nil {
		s.Refused.refuse(w, err)
		return
	}
	mode := s.opts.Modes.of(t.Channel)
	b := &budget{Reader: http.MaxBytesReader(w, r.Body, s.opts.MaxPayload), all: &s.held, limit: s.opts.HeldBuffer}
	defer b.end()
	event, err := s.capture(r, t, b, mode)
	if err != nil {
		s.Refused.refuse(w, err)
		return
	}
	if !s.begin() {
		s.Refused.refuse(w, errLeaving)
		return
	}
	defer s.requests.Done()
	if mode != modeAccept {
		s.serveHeld(w, r, &hold{event: event, budget: b, poke: make(chan struct{}, 1)}, mode)
		return
	}
	log := s.log.With("channel", event.Channel, "event", event.ID)
	// A sender that closes its side after the request looks as if it had gone.
	receivers, busErr := s.bus.Publish(context.WithoutCancel(r.Context()), event)
	if busErr != nil {
		log.Debug("webhook refused", "err", busErr)
		s.Refused.refuse(w, errBus)
		return
	}
	if receivers == 0 {
		s.Unheard.Add(1)
		log.Info("webhook reached no subscriber")
	} else {
		log.Debug("webhook published")
	}
	event.release()
}

// admitWebhook is everything that can be refused before the body is read; nil
// admits.
func (s *Server) admitWebhook(r *http.Request, t *requestTarget) *refusal {
	switch { // HTTP/2 can bring such methods and queries
	case !validName(t.Channel):
		return errChannel
	case !token(r.Method):
		return errBadMethod
	case checkPath(t.Path) != nil:
		return errInvalidPath
	case checkQuery(t.Query) != nil:
		return errQuery
	case tooManyFields(r.Header):
		return errFields
	}
	if s.opts.WebhooksAllowed != nil {
		if addr, err := s.remote(r); err != nil || !contains(s.opts.WebhooksAllowed, addr) {
			return errAddress
		}
	}
	if r.ContentLength > s.opts.MaxPayload { // before 100 Continue invites the body
		return errTooLarge
	}
	return nil
}

// tooManyFields reports whether h has more values than a request may have.
func tooManyFields(h map[string][]string) bool {
	n := 0
	for _, values := range h {
		n += len(values)
	}
	return n > fieldLimit
}

// begin counts a webhook in that is about to be published, unless the server
// is leaving: Shutdown closes no stream before the last of them is queued.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left {
		return false
	}
	s.requests.Add(1)
	return true
}

// buffers are for request bodies until they are encoded, and for frames that
// become one write.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// recycle puts buf back, unless a large body has made it large.
func recycle(buf *bytes.Buffer) {
	if buf.Cap() <= 1<<20 {
		buf.Reset()
		buffers.Put(buf)
	}
}

// budget is what one request counts for in a common limit, and the reader of
// its body, which counts while it is being read. It belongs to the request's
// goroutine; while the request is held, Server.mu guards it.
type budget struct {
	io.Reader
	all   *atomic.Int64
	limit int64 // of all
	part  int64 // of this one
}

// add counts n bytes more, or less, and tells whether all are within the limit.
func (b *budget) add(n int64) bool {
	b.part += n
	return b.all.Add(n) <= b.limit || n <= 0
}

// set makes n, and what any request takes, what this one counts for.
func (b *budget) set(n int) bool { return b.add(requestCost + int64(n) - b.part) }

// end counts the request out.
func (b *budget) end() { b.add(-b.part) }

func (b *budget) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if !b.add(int64(n)) {
		return n, errBudget
	}
	return n, err
}

// capture reads the request to its end and encodes it: the only copy that is
// kept, and what counts in b from then on.
func (s *Server) capture(r *http.Request, t *requestTarget, b *budget, mode string) (*Event, *refusal) {
	if !b.set(0) {
		return nil, errBudget
	}
	buf := buffers.Get().(*bytes.Buffer)
	defer recycle(buf)
	if r.ContentLength != 0 {
		buf.Grow(int(min(max(r.ContentLength, 0), 16<<10)) + bytes.MinRead)
		_, err := buf.ReadFrom(b)
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			return nil, errTooLarge
		} else if err == errBudget {
			return nil, errBudget
		} else if err != nil {
			return nil, errIncomplete
		}
	}
	webhook := &Webhook{
		ID:      newID(s.opts.Replica),
		Method:  r.Method,
		Path:    t.Path,
		Query:   t.Query,
		Headers: endToEnd(r.Header),
		Body:    buf.Bytes(),
		Time:    time.Now(),
		Mode:    mode,
		Timeout: s.opts.Timeouts.of(t.Channel),
	}
	if r.Host != "" {
		webhook.Headers = slices.Insert(webhook.Headers, 0, Header{"Host", []string{r.Host}})
	}
	if !b.set(webhook.wireSize()) {
		return nil, errBudget
	}
	event := newEvent(t.Channel, webhook)
	if len(event.chunk) >= lineLimit {
		return nil, errTooLarge
	}
	b.set(len(event.wire))
	return event, nil
}

// Held requests. The provider's open request is the only queue: a hold is one
// map entry, one timer in the request's own goroutine, and the event.

// hold is one request that waits for its target's answer. Server.mu guards it.
type hold struct {
	event   *Event
	budget  *budget
	poke    chan struct{} // holds one token when the goroutine has something to look at
	again   []string      // subscribers to deliver to once more; "": all
	sending bool          // a publish is under way, so given is not complete
	pending int           // replicas that took the event and have not said to whom it went
	sent    time.Time     // of the last publish
	given   []given
	best    *Answer
}

// given is one delivery and what became of it.
type given struct {
	Delivery
	state byte
}

const (
	stateOpen     = iota // on its way
	stateAnswered        // its client reported
	stateWritten         // a legacy client has it, and can tell no more
	stateLost            // its stream ended first
)

// serveHeld publishes the event of h and answers with what its target says.
func (s *Server) serveHeld(w http.ResponseWriter, r *http.Request, h *hold, mode string) {
	e := h.event
	timeout := s.opts.Timeouts.of(e.Channel)
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(timeout + replyTimeout))
	s.hold(h)
	defer s.release(h)
	answer, refused := s.await(r.Context(), h, time.Now().Add(timeout))
	switch {
	case refused != nil:
	case answer.Err == answerUnreachable:
		refused = errUnreachable
	case answer.Err != "":
		refused = errNoAnswer
	}
	log := s.log.With("channel", e.Channel, "event", e.ID)
	if refused != nil {
		s.Unanswered.Add(1)
		log.Info("webhook not answered", "status", refused.status, "err", refused)
		refuse(w, refused)
		return
	}
	s.Answered.Add(1)
	log.Debug("webhook answered", "status", answer.Status)
	header := w.Header()
	header["Content-Type"] = nil // net/http must not guess one
	if mode == modeResponse {
		public(header, answer.Headers, r.Header["Origin"] != nil)
	} else {
		answer.Body = nil
	}
	if r.Method != http.MethodHead && answer.Status != http.StatusNoContent && answer.Status != http.StatusNotModified {
		header.Set("Content-Length", strconv.Itoa(len(answer.Body)))
	}
	w.WriteHeader(answer.Status)
	w.Write(answer.Body)
}

// private lists what a target may say to its own proxy or its own browsers, but
// not on the relay's host; a name that ends in "-" stands for all that begin so.
var private = []string{
	"X-Accel-", "X-Sendfile", "X-Sendfile-", // nginx, Apache and lighttpd would serve files of the relay's host
	"Strict-Transport-Security", "Clear-Site-Data", "Alt-Svc", "Service-Worker-Allowed", "Refresh",
}

// public puts the fields of a target's answer into header as far as they
// concern the provider alone. Access-Control fields are for a browser that
// sent an Origin. What comes from inside is neither kept by caches nor sniffed.
func public(header http.Header, fields []Header, origin bool) {
	for _, f := range fields {
		if !slices.ContainsFunc(private, func(name string) bool {
			return f.Name == name || strings.HasSuffix(name, "-") && strings.HasPrefix(f.Name, name)
		}) && (origin || !strings.HasPrefix(f.Name, "Access-Control-")) {
			header[f.Name] = f.Values
		}
	}
	if header["Cache-Control"] == nil {
		header["Cache-Control"] = []string{"no-store"}
	}
	header["X-Content-Type-Options"] = []string{"nosniff"}
}

// hold makes h known to those who report; release forgets it.
func (s *Server) hold(h *hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holds[h.event.ID] = h
}

func (s *Server) release(h *hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.holds, h.event.ID)
}

// await publishes h's event, again whenever somebody new can take it, until
// there is an answer or a reason to give up: a refusal, or, when the provider
// has gone, anything.
func (s *Server) await(ctx context.Context, h *hold, deadline time.Time) (a Answer, refused *refusal) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	if err := s.publish(ctx, h, h.event); err != nil {
		return a, errBus
	}
	for {
		s.mu.Lock()
		if time.Since(h.sent) >= takenTimeout {
			h.pending = 0 // what took it was no replica, or is one no more
		}
		a, done := h.verdict()
		again := h.takeAgain()
		var look <-chan time.Time
		if h.pending > 0 {
			look = time.After(takenTimeout)
		}
		s.mu.Unlock()
		if done {
			return a, nil
		}
		for _, only := range again {
			if err := s.publishAgain(ctx, h, only); err != nil {
				s.log.Debug("held webhook not published again", "event", h.event.ID, "err", err)
				s.mu.Lock()
				h.again = append(h.again, only)
				s.mu.Unlock()
				look = time.After(busPause)
			}
		}
		if again != nil && look == nil {
			continue
		}
		select {
		case <-h.poke:
		case <-look:
		case <-s.giveUp:
			return a, errLeaving
		case <-ctx.Done():
			if ctx.Err() == context.Canceled {
				return a, errGone
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if h.best != nil {
				return *h.best, nil
			}
			if slices.ContainsFunc(h.given, func(g given) bool { return !g.Legacy && g.state == stateOpen }) {
				return a, errNoAnswer
			}
			return a, errNobody
		}
	}
}

// publish sends e for h and counts the replicas that will say to whom it went.
func (s *Server) publish(ctx context.Context, h *hold, e *Event) error {
	s.mu.Lock()
	h.sending = true
	s.mu.Unlock()
	n, err := s.bus.Publish(ctx, e)
	s.mu.Lock()
	h.sending = false
	h.pending += n
	h.sent = time.Now()
	s.mu.Unlock()
	return err
}

// publishAgain sends the event of h once more, to one subscriber or (empty) to
// all, when its turn comes.
func (s *Server) publishAgain(ctx context.Context, h *hold, only string) error {
	select {
	case s.turns <- struct{}{}:
		defer func() { <-s.turns }()
	case <-ctx.Done():
		return ctx.Err()
	case <-s.giveUp:
		return errShutdown
	}
	return s.publish(ctx, h, h.event.again(only))
}

// takeAgain is to whom the event must go once more: not to subscribers that
// have it already. One that became ready just now may be among those that a
// replica has yet to tell of; it stays in again until then, or takenTimeout.
// It needs Server.mu.
func (h *hold) takeAgain() (again []string) {
	if slices.Contains(h.again, "") {
		// What was said while the bus was down may never come: start over.
		h.again, h.pending = nil, 0
		h.given = slices.DeleteFunc(h.given, func(g given) bool { return g.state == stateOpen })
		return []string{""}
	}
	h.again = slices.DeleteFunc(h.again, func(id string) bool {
		return slices.ContainsFunc(h.given, func(g given) bool { return g.Subscriber == id })
	})
	if len(h.again) == 0 || h.pending > 0 {
		return nil
	}
	again, h.again = h.again, nil
	return again
}

// verdict is the answer once there is one: the first success; when everybody
// has answered the best of the failures; when only legacy clients have it,
// that it was written. It needs Server.mu.
func (h *hold) verdict() (a Answer, done bool) {
	if h.best != nil && h.best.Status/100 == 2 {
		return *h.best, true
	}
	if h.sending || h.pending > 0 {
		return a, false
	}
	written := false
	for _, g := range h.given {
		if g.state == stateOpen {
			return a, false
		}
		written = written || g.state == stateWritten
	}
	if h.best != nil {
		return *h.best, true
	}
	return Answer{Status: http.StatusOK}, written
}

// mark notes what became of a delivery; signals of one replica may overtake
// each other, so what is not known yet is noted too. It needs Server.mu.
func (h *hold) mark(d Delivery, state byte) {
	for i := range h.given {
		if g := &h.given[i]; g.Subscriber == d.Subscriber {
			if g.state == stateOpen {
				g.state = state
			}
			return
		}
	}
	if state != stateOpen {
		h.early(given{d, state})
		return
	}
	for i, g := range h.given { // the answer came first
		if g.Subscriber == "" && g.Client == d.Client {
			state = stateAnswered
			if d.Client == "" { // one anonymous answer is one delivery's
				h.given = slices.Delete(h.given, i, i+1)
			}
			break
		}
	}
	h.given = append(h.given, given{d, state})
}

// early notes what became of a delivery whose receipt is still to come. What
// subscribers can send without end has a bound. It needs Server.mu.
func (h *hold) early(g given) {
	if (h.sending || h.pending > 0) && len(h.given) < givenLimit {
		h.given = append(h.given, g)
	}
}

// answer notes a client's report. A client has one answer for all its
// streams; one without a name answers for one of the nameless, best for one
// that has not answered yet and whose stream still is there.
func (h *hold) answer(client string, a Answer) {
	if h.best == nil || a.rank() < h.best.rank() {
		h.best = &a
	}
	for _, state := range []byte{stateOpen, stateLost} {
		for i := range h.given {
			if g := &h.given[i]; g.Client == client && g.Subscriber != "" && g.state == state && !g.Legacy {
				g.state = stateAnswered
				if client == "" {
					return
				}
			}
		}
	}
	h.early(given{Delivery{Client: client}, stateAnswered})
}

// signal takes what replicas say about held requests. It never blocks: the
// bus calls it from its receiving loop.
func (s *Server) signal(sig Signal) {
	switch sig.Kind {
	case signalReady, signalLeft, signalAgain:
		s.presence(sig)
	case signalTaken, signalWritten:
		s.receipt(sig)
	case signalAnswer:
		if _, a, err := newReports(strings.NewReader(sig.Data)).next(s.waits); err == nil {
			s.answer(sig.Event, sig.Channel, sig.Client, a)
		}
	}
}

// waits reports whether the event id is held here.
func (s *Server) waits(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holds[id] != nil
}

// presence tells the holds of a channel who came and who went.
func (s *Server) presence(sig Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.holds {
		switch {
		case sig.Kind != signalAgain && h.event.Channel != sig.Channel:
			continue
		case sig.Kind == signalLeft:
			h.mark(Delivery{Subscriber: sig.Subscriber}, stateLost)
		case !slices.Contains(h.again, sig.Subscriber):
			h.again = append(h.again, sig.Subscriber)
		}
		wake(h.poke)
	}
}

// receipt tells a hold to whom its event went.
func (s *Server) receipt(sig Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.holds[sig.Event]
	if h == nil {
		return
	}
	if sig.Kind == signalWritten {
		h.mark(Delivery{Subscriber: sig.Subscriber, Legacy: true}, stateWritten)
	} else {
		if h.sending || h.pending > 0 { // otherwise it comes late
			h.pending--
		}
		var taken []Delivery
		json.Unmarshal([]byte(sig.Data), &taken) // a replica's own words
		for _, d := range taken {
			h.mark(d, stateOpen)
		}
	}
	wake(h.poke)
}

// answer gives a client's report to the request that waits for it, if any.
func (s *Server) answer(id, channel, client string, a Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.holds[id]
	if h == nil || h.event.Channel != channel {
		return
	}
	had := h.best.size()
	h.answer(client, a)
	h.budget.add(h.best.size() - had) // whatever the limit: it is what makes space
	wake(h.poke)
}

// serveReport takes what a client reports on one or more events, as HTTP
// responses one after the other. What nobody waits for any more is no mistake.
func (s *Server) serveReport(w http.ResponseWriter, r *http.Request, channel string) {
	if _, _, ok := s.authorise(w, r, http.MethodPost, channel); !ok {
		return
	}
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(reportTime)) // one that stalls keeps out others
	b := &budget{Reader: http.MaxBytesReader(w, r.Body, reportLimit), all: &s.reports, limit: reportsLimit}
	defer b.end()
	client, list := clientName(r), newReports(b)
	wanted := func(id string) bool { return replicaOf(id) != s.opts.Replica || s.waits(id) }
	for n := 0; ; n++ {
		id, answer, err := list.next(wanted)
		switch {
		case err == io.EOF && n > 0:
			w.WriteHeader(http.StatusNoContent)
			return
		case errors.Is(err, errBudget):
			s.Rejected.refuse(w, errBudget)
			return
		case err != nil:
			s.log.Warn("report refused", "channel", channel, "err", err)
			s.Rejected.refuse(w, errReport)
			return
		}
		if err := s.route(r.Context(), id, channel, client, answer); err != nil {
			s.log.Debug("report not taken", "channel", channel, "event", id, "err", err)
			s.Rejected.refuse(w, errBus)
			return
		}
	}
}

// route brings an answer to the replica that holds its request, here or
// elsewhere.
func (s *Server) route(ctx context.Context, id, channel, client string, a Answer) error {
	if replicaOf(id) == s.opts.Replica {
		s.answer(id, channel, client, a)
		return nil
	}
	var data bytes.Buffer
	a.appendReport(&data, id)
	_, err := s.bus.Signal(ctx, Signal{
		Kind: signalAnswer, To: replicaOf(id), From: s.opts.Replica, Channel: channel, Event: id, Client: client, Data: data.String(),
	})
	return err
}

// Who may subscribe, and from where.

// keyring is one reading of all tokens, as hashes. It is immutable.
type keyring struct {
	open   bool                  // no token is configured at all
	tokens map[string][][32]byte // by channel; "*" for any
	sum    [32]byte              // of the file, to notice a change
	whole  bool                  // its last line is complete
}

// loadKeys reads the tokens of opts.
func loadKeys(opts ServerOptions) (*keyring, error) {
	k := &keyring{open: opts.Token == "" && opts.TokensFile == "", whole: true, tokens: map[string][][32]byte{}}
	if opts.TokensFile != "" {
		f, err := os.Open(opts.TokensFile)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, tokensLimit+1))
		if err != nil {
			return nil, err
		}
		if len(data) > tokensLimit {
			return nil, fmt.Errorf("%s: larger than %d bytes", opts.TokensFile, tokensLimit)
		}
		if k.tokens, err = parseTokens(string(data)); err != nil {
			return nil, fmt.Errorf("%s: %w", opts.TokensFile, err)
		}
		k.sum = sha256.Sum256(data)
		k.whole = bytes.HasSuffix(data, []byte("\n"))
	}
	if opts.Token != "" {
		k.tokens["*"] = append(k.tokens["*"], sha256.Sum256([]byte(opts.Token)))
	}
	return k, nil
}

// parseTokens reads lines of "channel token"; "*" stands for any channel, and
// "#" begins a comment line. Its errors name lines, never their text. A file
// without any token is an error, so that a truncated one never takes force.
func parseTokens(text string) (map[string][][32]byte, error) {
	tokens := map[string][][32]byte{}
	number := 0
	for line := range strings.Lines(strings.TrimPrefix(text, "\uFEFF")) {
		number++
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0 || strings.HasPrefix(fields[0], "#"):
			continue
		case len(fields) != 2:
			return nil, fmt.Errorf("line %d: want a channel and a token", number)
		case fields[0] != "*" && !validName(fields[0]):
			return nil, fmt.Errorf("line %d: invalid channel", number)
		}
		tokens[fields[0]] = append(tokens[fields[0]], sha256.Sum256([]byte(fields[1])))
	}
	if len(tokens) == 0 {
		return nil, errors.New("holds no token")
	}
	return tokens, nil
}

// allows tells whether the hash of a token opens channel, in a time that does
// not depend on how much of it is right.
func (k *keyring) allows(channel string, credential [32]byte) bool {
	found := 0
	for _, list := range [][][32]byte{k.tokens["*"], k.tokens[channel]} {
		for _, want := range list {
			found |= subtle.ConstantTimeCompare(credential[:], want[:])
		}
	}
	return k.open || found == 1
}

// authorise admits a subscriber's request to channel, or answers it. Unknown
// and forbidden channels get the same answer.
func (s *Server) authorise(w http.ResponseWriter, r *http.Request, method, channel string) (addr netip.Addr, credential [32]byte, ok bool) {
	addr, err := s.remote(r)
	token := r.Header.Get("X-Auth-Token")
	if scheme, bearer, _ := strings.Cut(r.Header.Get("Authorization"), " "); token == "" && strings.EqualFold(scheme, "Bearer") {
		token = strings.TrimSpace(bearer)
	}
	credential = sha256.Sum256([]byte(token))
	var refused *refusal
	switch {
	case !validName(channel):
		refused = errChannel
	case r.Method != method:
		w.Header().Set("Allow", method)
		refused = errMethod
	case s.opts.SubscribeAllowed != nil && (err != nil || !contains(s.opts.SubscribeAllowed, addr)):
		s.log.Warn("subscriber refused: address not allowed", "channel", channel, "addr", addr)
		refused = errAddress
	case !s.keys.Load().allows(channel, credential):
		s.log.Warn("subscriber refused: missing or wrong token", "channel", channel, "addr", addr)
		w.Header().Set("WWW-Authenticate", "Bearer")
		refused = errToken
	default:
		return addr, credential, true
	}
	s.Rejected.refuse(w, refused)
	return addr, credential, false
}

func contains(list []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// remote is the address a request comes from: the peer's, or, behind trusted
// proxies, the rightmost in X-Forwarded-For that is not one of them. What a
// sender writes further left never counts; what cannot be read is an error.
func (s *Server) remote(r *http.Request) (netip.Addr, error) {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("remote address: %w", err)
	}
	return forwardedFor(peer.Addr().Unmap().WithZone(""), r.Header["X-Forwarded-For"], s.opts.TrustedProxies)
}

// forwardedFor walks the header lines, which are one list (RFC 9110 section
// 5.3), from the right past trusted proxies.
func forwardedFor(addr netip.Addr, lines []string, trusted []netip.Prefix) (netip.Addr, error) {
	if len(trusted) == 0 || len(lines) == 0 {
		return addr, nil
	}
	hops := strings.Split(strings.Join(lines, ","), ",")
	for i := len(hops) - 1; i >= 0 && contains(trusted, addr); i-- {
		hop := strings.TrimSpace(hops[i])
		next, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(hop, "["), "]"))
		if err != nil { // some proxies append the port
			var withPort netip.AddrPort
			if withPort, err = netip.ParseAddrPort(hop); err != nil {
				return netip.Addr{}, errors.New("X-Forwarded-For holds no address where a trusted proxy wrote")
			}
			next = withPort.Addr()
		}
		addr = next.Unmap().WithZone("")
	}
	return addr, nil
}

// clientName is how a client names itself over its streams and reports.
func clientName(r *http.Request) string {
	if name := r.Header.Get("X-Relay-Client"); validName(name) {
		return strings.Clone(name)
	}
	return ""
}

// Streams.

// sink is where a stream is written to: a hijacked connection, or what
// net/http offers for HTTP/2.
type sink interface {
	io.Writer
	SetWriteDeadline(time.Time) error
	Flush() error
}

// connSink is an HTTP/1 connection taken from net/http, whose buffers and
// goroutines would cost several times what the stream itself does.
type connSink struct{ net.Conn }

func (connSink) Flush() error { return nil }

// responseSink is an ordinary response.
type responseSink struct {
	io.Writer
	*http.ResponseController
}

// stream writes one subscriber's stream. While nothing is to be written it
// has no goroutine but the one that waits for the end of its connection.
type stream struct {
	server    *Server
	sub       *Subscriber
	out       sink
	chunked   bool // HTTP/1.1 on a hijacked connection
	heartbeat *time.Timer
	ages      []*time.Timer // what happens at StreamMaxAge; empty without
}

// streamHeader is the response header of every stream; no-transform and
// X-Accel-Buffering keep proxies from holding it back
// (https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_buffering).
var streamHeader = [][2]string{
	{"Content-Type", "text/event-stream"},
	{"Cache-Control", "no-cache, no-transform"},
	{"X-Accel-Buffering", "no"},
}

// The relay's own events, shared by all streams.
var (
	heartbeatEvent = newFrame("event: heartbeat\ndata: {}\n\n")
	drainEvent     = newFrame("event: drain\ndata: {}\n\n")
)

func readyEvent(heartbeat time.Duration) *Event {
	return newFrame(fmt.Sprintf("id: 0\nevent: ready\ndata: {\"heartbeatInterval\":%d}\n\n", heartbeat.Milliseconds()))
}

// serveSubscribe opens a stream.
func (s *Server) serveSubscribe(w http.ResponseWriter, r *http.Request, channel string) {
	addr, credential, ok := s.authorise(w, r, http.MethodGet, channel)
	if !ok {
		return
	}
	sub := &Subscriber{
		Channel: strings.Clone(channel), Client: clientName(r), // not the whole header they are part of
		Addr: addr, Credential: credential,
	}
	for feature := range strings.SplitSeq(strings.Join(r.Header["X-Relay-Features"], ","), ",") {
		switch strings.TrimSpace(feature) {
		case "http":
			sub.HTTP = true
		case "respond":
			sub.Responds = true
		case "drain":
			sub.Drains = true
		}
	}
	if r.ContentLength != 0 { // it would fill HTTP/2's buffers while the stream lasts
		s.Rejected.refuse(w, errUnwanted)
		return
	}
	if !s.enter(sub) {
		s.Rejected.refuse(w, errLeaving)
		return
	}
	st := &stream{server: s, sub: sub}
	sub.Write = st.write
	if err := s.hub.Subscribe(sub); err != nil {
		s.exit(sub)
		s.log.Warn("subscriber refused", "channel", channel, "addr", addr, "err", err)
		s.Rejected.refuse(w, errLimit)
		return
	}
	if !s.keys.Load().allows(channel, credential) { // revoked before the hub could evict it
		s.abandon(sub, errRevoked)
		s.Rejected.refuse(w, errToken)
		return
	}
	if !s.awaitLive(r.Context(), sub) {
		s.abandon(sub, errPeerGone)
		s.Rejected.refuse(w, errBus)
		return
	}
	if r.ProtoMajor > 1 {
		s.serveResponse(w, r, st)
	} else {
		st.chunked = r.ProtoAtLeast(1, 1)
		s.serveConn(w, st)
	}
}

// serveResponse streams over an ordinary response. The handler's goroutine
// waits for the end, so that nobody has to wait for HTTP/2's own goroutine
// under the hub's lock.
func (s *Server) serveResponse(w http.ResponseWriter, r *http.Request, st *stream) {
	for _, f := range streamHeader {
		w.Header().Set(f[0], f[1])
	}
	out := responseSink{w, http.NewResponseController(w)}
	gone := make(chan struct{})
	st.sub.Writers.Go(func() { st.begin(out, func() { close(gone) }, nil) })
	select {
	case <-gone:
	case <-r.Context().Done():
		s.hub.Leave(st.sub, errPeerGone)
	}
	if reason := s.hub.Reason(st.sub); reason != errShutdown && reason != errStreamAge { // those come after the last write
		out.SetWriteDeadline(past)
	}
	st.end()
}

// serveConn takes the connection and streams over it. A fresh, small goroutine
// waits for its end, so that the handler's, whose stack has grown, can finish.
func (s *Server) serveConn(w http.ResponseWriter, st *stream) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.abandon(st.sub, err)
		s.Rejected.refuse(w, errConnection)
		return
	}
	sent := buffered.Reader.Buffered()
	st.begin(connSink{conn}, func() { conn.SetDeadline(past) }, openConn(st.chunked))
	go func() { // ends with the connection; exit counts it out
		b := make([]byte, 16)
		for sent <= chatterLimit {
			n, err := conn.Read(b)
			if sent += n; err != nil {
				break
			}
		}
		s.hub.Leave(st.sub, errPeerGone)
		st.end()
	}()
}

// past makes a deadline fail at once.
var past = time.Unix(1, 0)

// enter counts a stream in unless the server is leaving; exit counts it out.
func (s *Server) enter(sub *Subscriber) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left {
		return false
	}
	s.streams.Add(1)
	if sub.Drains {
		s.movers.Add(1)
	}
	return true
}

func (s *Server) exit(sub *Subscriber) {
	if sub.Drains {
		s.movers.Done()
	}
	s.streams.Done()
}

// abandon ends a stream that never began. It may have been given events.
func (s *Server) abandon(sub *Subscriber, reason error) {
	s.hub.Leave(sub, reason)
	s.tellLeft(sub)
	s.exit(sub)
}

// tellLeft tells all replicas that sub answers no more.
func (s *Server) tellLeft(sub *Subscriber) {
	s.bus.Signal(context.Background(), Signal{Kind: signalLeft, Channel: sub.Channel, Subscriber: sub.ID})
}

// awaitLive waits until the bus has confirmed the subscription.
func (s *Server) awaitLive(ctx context.Context, sub *Subscriber) bool {
	select {
	case <-sub.Live:
		return true
	case <-ctx.Done():
	case <-s.giveUp:
	case <-time.After(liveTimeout):
	}
	return false
}

// openConn is the head of a stream on a hijacked connection. Without chunks, to
// a reader of HTTP/1.0, the body ends with the connection (RFC 9112 section 6.3).
func openConn(chunked bool) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 200 OK\r\nConnection: close\r\nDate: %s\r\n", time.Now().UTC().Format(http.TimeFormat))
	for _, f := range streamHeader {
		fmt.Fprintf(&b, "%s: %s\r\n", f[0], f[1])
	}
	if chunked {
		b.WriteString("Transfer-Encoding: chunked\r\n")
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// begin writes the stream's head and what has queued meanwhile, and starts its
// timers. Nobody else writes until it returns.
func (st *stream) begin(out sink, abort func(), head []byte) {
	s, sub := st.server, st.sub
	st.out = out
	s.hub.Attach(sub, abort)
	if err := st.send(append(head, st.form(readyEvent(s.opts.Heartbeat))...)); err != nil {
		s.hub.Leave(sub, err)
		return
	}
	s.log.Info("subscriber ready", "channel", sub.Channel, "subscriber", sub.ID, "addr", sub.Addr, "client", sub.Client)
	st.heartbeat = time.AfterFunc(time.Hour, st.beat) // beat resets it, so it must be there first
	st.heartbeat.Reset(s.opts.Heartbeat)
	if age := s.opts.StreamMaxAge; age > 0 {
		age -= mathrand.N(age/10 + 1) // not all streams of a replica at once
		st.ages = []*time.Timer{
			time.AfterFunc(age, func() { s.askToMove(sub) }),
			time.AfterFunc(age+s.opts.HandlerTimeout, func() { s.hub.Finish(sub, errStreamAge) }),
			time.AfterFunc(age+2*s.opts.HandlerTimeout, func() { s.hub.Leave(sub, errOverdue) }),
		}
	}
	s.mu.Lock()
	left := s.left
	s.mu.Unlock()
	if left {
		s.askToMove(sub)
	}
	s.bus.Signal(context.Background(), Signal{Kind: signalReady, Channel: sub.Channel, Subscriber: sub.ID})
	st.write()
}

// end waits for the last write of a stream that the hub has ended.
func (st *stream) end() {
	s, sub := st.server, st.sub
	sub.Writers.Wait()
	if st.heartbeat != nil {
		st.heartbeat.Stop()
	}
	for _, t := range st.ages {
		t.Stop()
	}
	level, reason := slog.LevelInfo, s.hub.Reason(sub)
	if conn, ok := st.out.(connSink); ok {
		if st.chunked && (reason == errShutdown || reason == errStreamAge) { // all is written: the body is complete
			conn.SetWriteDeadline(time.Now().Add(lastChunkTime))
			io.WriteString(conn, "0\r\n\r\n")
		}
		conn.Close()
	}
	s.tellLeft(sub)
	if reason == errSlow || reason == errRevoked {
		level = slog.LevelWarn
	}
	s.log.Log(context.Background(), level, "subscriber gone", "channel", sub.Channel, "subscriber", sub.ID, "reason", reason)
	s.exit(sub)
}

// beat is the heartbeat, whatever else is sent.
func (st *stream) beat() {
	if st.server.hub.Push(st.sub, heartbeatEvent) {
		st.server.Heartbeats.Add(1)
		st.heartbeat.Reset(st.server.opts.Heartbeat)
	}
}

// askToMove sends drain to a client that knows it.
func (s *Server) askToMove(sub *Subscriber) {
	if sub.Drains {
		s.hub.Push(sub, drainEvent)
	}
}

// send writes p at once, or fails when the subscriber is gone: a deadline, a
// write, a flush, and every error ends the stream.
func (st *stream) send(p []byte) error {
	// The deadline first: whoever ends the subscriber sets Gone and then a
	// deadline in the past, which must stay.
	if err := st.out.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if st.sub.Gone.Load() {
		return errPeerGone
	}
	if _, err := st.out.Write(p); err != nil {
		return fmt.Errorf("write to stream: %w", err)
	}
	if err := st.out.Flush(); err != nil {
		return fmt.Errorf("write to stream: %w", err)
	}
	if _, ok := st.out.(responseSink); ok { // HTTP/2 resets a stream whose deadline passes, even an idle one
		return st.out.SetWriteDeadline(time.Time{})
	}
	return nil
}

// write is Subscriber.Write: every batch is one write.
func (st *stream) write() {
	s, sub := st.server, st.sub
	var few [8]*Event
	for batch := sub.Take(few[:0]); len(batch) > 0; batch = sub.Take(batch) {
		if err := st.sendBatch(batch); err != nil {
			s.hub.Leave(sub, err)
			return
		}
		for _, e := range batch {
			if respond(e.Mode) && !sub.Responds { // all that a legacy client can tell
				s.bus.Signal(context.Background(), Signal{
					Kind: signalWritten, To: replicaOf(e.ID), Channel: sub.Channel, Event: e.ID, Subscriber: sub.ID,
				})
			}
			e.release()
		}
		if sub.Missed() { // there is space again
			s.bus.Signal(context.Background(), Signal{Kind: signalReady, Channel: sub.Channel, Subscriber: sub.ID})
		}
	}
}

// form is what is written of e when it is alone.
func (st *stream) form(e *Event) []byte {
	chunk := e.chunkFor(st.sub.HTTP)
	if !st.chunked {
		return block(chunk)
	}
	return chunk
}

// sendBatch is one write, and over HTTP/1.1 one chunk: readers that wait for
// whole chunks see every event at once.
func (st *stream) sendBatch(batch []*Event) error {
	if len(batch) == 1 {
		return st.send(st.form(batch[0]))
	}
	buf := buffers.Get().(*bytes.Buffer)
	size := chunkHead + chunkTail
	for _, e := range batch {
		size += len(e.chunkFor(st.sub.HTTP))
	}
	buf.Grow(size)
	all := appendChunk(buf.AvailableBuffer(), func(b []byte) []byte {
		for _, e := range batch {
			b = append(b, block(e.chunkFor(st.sub.HTTP))...)
		}
		return b
	})
	if !st.chunked {
		all = block(all)
	}
	err := st.send(all)
	if err == nil { // net/http may still read what it failed to write
		recycle(buf)
	}
	return err
}

// Held is how many requests are held, and how many bytes they and the bodies
// that are being read take.
func (s *Server) Held() (requests int, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.holds), s.held.Load()
}
