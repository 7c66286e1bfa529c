// The server: what it takes, from whom, what it holds, and the streams it writes.
// In the order of a webhook: ServeHTTP, serveWebhook, relay, capture; its hold,
// from first over receipt and reported to end; reply. Then reports, who may do
// what, streams, and the end of it all. The package doc in relay.go tells the
// protocol.

package main

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
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
	busTimeout     = 2 * time.Second        // for the bus to take a webhook, its return included
	receiptTimeout = time.Second            // for replicas to say to whom an event was given
	returnTime     = 10 * time.Second       // for a client whose stream broke to come back under its name
	lookInterval   = 250 * time.Millisecond // between looks at what has a time
	retryInterval  = time.Second            // before what nobody took is published again unasked
	strangeShare   = 32                     // part of the budget for channels that may yet prove to be known
	idleTimeout    = 2 * time.Minute        // between two requests on a connection
	writeTimeout   = 60 * time.Second       // for one write to a stream: a full client may pause this long
	lastChunkTime  = time.Second            // to write the end of a stream
	liveTimeout    = 5 * time.Second        // until a new stream is subscribed on every replica
	awayTimeout    = time.Second            // the same, while the bus is away
	probeTimeout   = 2 * time.Second        // for a balancer's probe
	moveTime       = 2 * time.Second        // for a client to follow a drain before its stream ends
	moveJitter     = time.Second            // over which drain is spread at shutdown
	reserve        = time.Second            // of the handler timeout, kept for closing streams and handing over
	reloadInterval = 3 * time.Second        // between looks at a watched file
	settleInterval = time.Second            // between looks at the start, while its last line is not complete
	settleTime     = 10 * time.Second       // for it to become so
	watchedLimit   = 1 << 20                // bytes of a watched file
	signatureAge   = 5 * time.Minute        // to either side, of a signature that tells its time
	reportTime     = 10 * time.Second       // to send reports, twice what a client takes for one try
	reportLimit    = 4 << 20                // bytes of the reports of one request
	reportsLimit   = 128 << 20              // bytes of all reports that are being read, shared as webhooks share theirs
	passLimit      = 5                      // leaving replicas that hand an event to each other
	awayLimit      = 1024                   // replicas that are remembered as gone
	departedLimit  = 16384                  // subscribers that are remembered as gone
	chatterLimit   = 4 << 10                // bytes a subscriber may send after its request
	lingerLimit    = 16 << 20               // bytes of a refused body that are read so that the answer arrives
	lingerTime     = 5 * time.Second        // for them
	retryAfter     = "5"                    // seconds, on every 503

	channelsShown    = 100 // channels on the status page
	subscribersShown = 20  // of each
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
	HoldTime       time.Duration // for which accept holds what no client is there for
	StreamMaxAge   time.Duration // 0: none
	HandlerTimeout time.Duration // for everything that Shutdown does
	Modes          byChannel[string]
	Timeouts       byChannel[time.Duration]

	Token            string // empty with an empty TokensFile: none is asked for
	TokensFile       string
	ClientCAFile     string         // empty: subscribers need no certificate
	SecretsFile      string         // empty: webhooks need no signature
	SubscribeAllowed []netip.Prefix // nil: everybody
	WebhooksAllowed  []netip.Prefix // nil: everybody
	TrustedProxies   []netip.Prefix
}

// Server takes webhooks, holds them until clients have reported, and writes the
// streams. It is an http.Handler; Run looks after what has a time, and Shutdown
// ends it.
type Server struct {
	opts    ServerOptions
	log     *slog.Logger
	hub     *Hub
	bus     Bus
	budget  *Budget
	reports *Budget // of reports that are being read
	tokens  watched[byChannel[[][32]byte]]
	secrets watched[byChannel[[]secret]]
	issuers watched[*x509.CertPool] // of subscribers' certificates
	began   time.Time               // times that clients compare are counted from here

	Accepted, Answered, Heartbeats atomic.Int64
	Refused, Lost, Rejected        tally     // webhooks, webhooks, subscribers and their reports; by reason
	Taken, Replied                 Histogram // from a webhook's coming until a client has it (accept); until its provider has the target's answer

	// Note keeps p for the status page in place of entry, or as a new one when that
	// is 0, and returns its number. Set before use; called under mu too.
	Note func(entry uint64, p Passage) uint64

	draining atomic.Bool   // not ready any more, but still at work
	giveUp   chan struct{} // closed: held requests, and streams that have not begun, end with 503

	requests sync.WaitGroup // webhooks being published or held; Add only under mu while !closed
	streams  sync.WaitGroup // goroutines of streams; Add only under mu while !leaving
	couriers sync.WaitGroup // goroutines that publish again; Add only under mu while !over

	mu sync.Mutex

	// Guarded by mu.
	leaving  bool                // no new streams
	alone    bool                // no other replica will take what is held at the end
	closed   bool                // no new webhooks
	over     bool                // nothing is published again
	heirs    []string            // replicas that may hold what was held here, once over
	holds    map[string]*hold    // by event id
	lines    map[string]*line    // by channel
	having   map[string]*having  // by subscriber: who has events that are not settled
	departed map[string]struct{} // subscribers that are gone, and of whom a receipt may come late
	late     []string            // departed, the oldest first
	away     map[string]bool     // replicas that are gone, and may come back
	awaited  []deadline          // receipts that are due, the earliest first
	returns  []deadline          // clients whose time to come back ends, the earliest first
	strange  int64               // bytes of holds of channels that are not known
	unsure   time.Time           // since when it knows of all channels: its start, or the last time that it may not have been told of some
	order    uint64              // of the newest hold
}

// NewServer makes a server over hub, whose signals its caller hands to it, and bus.
// It reads the watched files: its error is a mistake in one of them.
func NewServer(opts ServerOptions, hub *Hub, bus Bus, log *slog.Logger) (*Server, error) {
	s := &Server{
		opts: opts, log: log, hub: hub, bus: bus, budget: hub.Budget, reports: &Budget{Limit: reportsLimit}, began: time.Now(), unsure: time.Now(),
		tokens:  watched[byChannel[[][32]byte]]{variable: "AUTH_TOKENS_FILE", name: opts.TokensFile, parse: parseTokens},
		secrets: watched[byChannel[[]secret]]{variable: "WEBHOOK_SECRETS_FILE", name: opts.SecretsFile, parse: parseSecrets},
		issuers: watched[*x509.CertPool]{variable: "SERVER_TLS_CLIENT_CA_FILE", name: opts.ClientCAFile, parse: parseIssuers},
		giveUp:  make(chan struct{}),
		holds:   map[string]*hold{}, lines: map[string]*line{}, having: map[string]*having{}, departed: map[string]struct{}{}, away: map[string]bool{},
		Refused: newTally(webhookReasons...), Lost: newTally(lostReasons...), Rejected: newTally(subscriberReasons...),
		Note: func(uint64, Passage) uint64 { return 0 },
	}
	if err := cmp.Or(s.tokens.open(), s.secrets.open(), s.issuers.open()); err != nil {
		return nil, err
	}
	return s, nil
}

// Run looks after holds and the watched files until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	defer s.couriers.Wait()
	look, reload := time.NewTicker(lookInterval), time.NewTicker(reloadInterval)
	defer look.Stop()
	defer reload.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			s.look(time.Now())
		case <-reload.C:
			s.secrets.reload(s.log)
			tokens, issuers := s.tokens.reload(s.log), s.issuers.reload(s.log)
			if tokens || issuers {
				s.revoke()
			}
		}
	}
}

// revoke ends the streams whose token or certificate is not good any more.
func (s *Server) revoke() {
	for _, sub := range s.hub.Subscribers() {
		if s.denies(sub.Channel, sub.Credential) != nil {
			s.hub.Leave(sub, errRevoked)
		}
	}
}

// Alive is nil unless somebody sits on mu.
func (s *Server) Alive(ctx context.Context) error { return comesFree(ctx, "server", &s.mu) }

// Check is nil while the server is not draining.
func (s *Server) Check(context.Context) error {
	if s.draining.Load() {
		return errShutdown
	}
	return nil
}

// Drain turns the server unready; it goes on working.
func (s *Server) Drain() { s.draining.Store(true) }

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
		s.misdirected(w, r, errNotFound)
	case err != nil:
		s.misdirected(w, r, errInvalidPath)
	case t.Kind == "webhooks" && t.Path != "/webhooks":
		s.serveWebhook(w, r, &t)
	case t.Kind == "subscribe" && t.Channel != "" && (t.Tail == "" || t.Tail == "/"):
		s.serveSubscribe(w, r, t.Channel)
	case t.Kind == "subscribe" && t.Tail == "/responses":
		s.serveReport(w, r, t.Channel)
	case t.Path == "/" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
		s.serveReady(w, r)
	case t.Path == "/":
		w.Header().Set("Allow", "GET, HEAD")
		s.misdirected(w, r, errMethod)
	default:
		s.misdirected(w, r, errNotFound)
	}
}

// misdirected refuses what has no place here. That may be a webhook whose
// provider was given a wrong path; GET is a browser or a scanner.
func (s *Server) misdirected(w http.ResponseWriter, r *http.Request, refused *refusal) {
	path, _, _ := strings.Cut(r.RequestURI, "?")
	p, level := passageOf(r, path), slog.LevelWarn
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		level = slog.LevelInfo
	}
	s.turnAway(w, r, &hold{passage: p}, refused, level, "request refused",
		slog.String("hint", "webhooks go to /webhooks/{channel}, streams are at /subscribe/{channel}"))
}

// passageOf is what is known of a request from its header.
func passageOf(r *http.Request, path string) Passage {
	return Passage{Method: shown(r.Method), Path: shown(path), Time: time.Now(), Bytes: int(max(r.ContentLength, 0)), Outcome: outcomeHeld}
}

// turnAway counts, tells and answers that h was refused; a warning is on the status
// page too.
func (s *Server) turnAway(w http.ResponseWriter, r *http.Request, h *hold, refused *refusal, level slog.Level, message string, more ...slog.Attr) {
	s.Refused[refused.reason].Add(1)
	end := h.passage.became(outcomeRefused, refused.reason)
	end.Status = refused.status
	if level == slog.LevelWarn {
		s.Note(h.entry, end)
	}
	addr, _ := s.remote(r)
	end.tell(s.log, level, message, append(more, slog.String("reason", refused.message), slog.Any("addr", addr))...)
	refuse(w, r, refused)
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
	errSignature   = &refusal{http.StatusUnauthorized, "missing or wrong signature", "signature"}
	errCertificate = &refusal{http.StatusUnauthorized, "missing or wrong certificate", "certificate"}
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

// All that may stand in a label: why webhooks are refused and lost, and
// subscribers refused.
var (
	webhookReasons    = []string{"address", "body", "budget", "bus", "channel", "gone", "method", "nobody", "path", "shutdown", "signature", "size", "timeout", "unreachable"}
	lostReasons       = []string{"no_client", "no_space", "shutdown", "unknown_channel"}
	subscriberReasons = []string{"address", "body", "budget", "bus", "certificate", "channel", "connection", "limit", "method", "shutdown", "token"}
)

// refuse answers with err. A body that is still on its way is read for a while,
// so that the answer also arrives through a proxy that sends it first: closing a
// connection with unread bytes resets it, and what was sent on it is lost
// (https://nginx.org/en/docs/http/ngx_http_core_module.html#lingering_close).
func refuse(w http.ResponseWriter, r *http.Request, err *refusal) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	if err.status == http.StatusServiceUnavailable {
		h.Set("Retry-After", retryAfter)
	}
	text := fmt.Sprintf(`{"statusCode":%d,"message":"%s"}`, err.status, err.message)
	h.Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(err.status)
	io.WriteString(w, text)
	if r.ProtoMajor == 1 && r.ContentLength != 0 && r.Header.Get("Expect") == "" {
		control := http.NewResponseController(w)
		control.Flush()
		control.SetReadDeadline(time.Now().Add(lingerTime))
		io.CopyN(io.Discard, r.Body, lingerLimit)
	}
}

// serveReady is /ready of the health service, for balancers that can only
// probe the port that takes traffic.
func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
	defer cancel()
	switch {
	case s.draining.Load():
		refuse(w, r, errLeaving)
	case s.bus.Check(ctx) != nil:
		refuse(w, r, errBus)
	default:
		io.WriteString(w, "ok\n")
	}
}

// serveWebhook takes one webhook of a provider, and tells once what its provider
// was told. In accept mode its fate may be known only later.
func (s *Server) serveWebhook(w http.ResponseWriter, r *http.Request, t *requestTarget) {
	h := &hold{passage: passageOf(r, t.Path)}
	p, level := &h.passage, slog.LevelInfo
	if len(r.RequestURI) > shownLimit { // what is kept must not keep all of it
		p.Method, p.Path, t.Channel = strings.Clone(p.Method), strings.Clone(p.Path), strings.Clone(t.Channel)
	}
	p.Channel, p.Attempt = shown(t.Channel), 1
	status, refused := s.relay(w, r, t, h)
	switch {
	case refused != nil:
		s.turnAway(w, r, h, refused, slog.LevelWarn, "webhook refused", slog.String("channel", p.Channel))
	case h.done != nil:
		s.Answered.Add(1)
		end := p.became(outcomeAnswered, "")
		s.Replied.Observe(end.took())
		end.Status, end.Attempt = status, h.round
		s.Note(h.entry, end)
		if status >= 500 {
			level = slog.LevelWarn
		}
		end.tell(s.log, level, "webhook answered", slog.String("channel", end.Channel))
	case status != 0:
		end := p.became(outcomeAccepted, "")
		end.Status = status
		end.tell(s.log, level, "webhook accepted", slog.String("channel", end.Channel))
	}
}

// relay brings a webhook on its way, and returns when its provider is to be
// told: refused, or that it was answered with status, or, with 0, that it was
// lost, which has been told.
func (s *Server) relay(w http.ResponseWriter, r *http.Request, t *requestTarget, h *hold) (status int, refused *refusal) {
	if refused = s.admitWebhook(r, t); refused != nil {
		return 0, refused
	}
	claim, ok := s.budget.claim(t.Channel, requestCost)
	if !ok {
		return 0, errBudget
	}
	defer claim.end() // before the rest of a refused body is read
	if refused = s.capture(w, r, t, claim, h); refused != nil {
		return 0, refused
	}
	if respond(h.event.Mode) {
		h.done, h.claim = make(chan struct{}), claim
	}
	w.Header()["X-Relay-Event-Id"] = []string{h.event.ID}
	if refused = s.begin(h); refused != nil {
		h.event.release()
		return 0, refused
	}
	defer s.requests.Done()
	lost, refused := s.first(h)
	switch {
	case lost || refused != nil:
		return 0, refused
	case respond(h.event.Mode):
		return s.reply(w, r, h)
	}
	return http.StatusOK, nil // which net/http sends
}

// admitWebhook is everything that can be refused before the body is read; nil
// admits.
func (s *Server) admitWebhook(r *http.Request, t *requestTarget) *refusal {
	switch { // HTTP/2 can bring such methods and queries
	case !validName(t.Channel):
		return errChannel
	case !isToken(r.Method):
		return errBadMethod
	case checkPath(t.Path) != nil:
		return errInvalidPath
	case checkQuery(t.Query) != nil:
		return errQuery
	case valueCount(r.Header) > fieldLimit:
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

// body reads a request's body, which counts in claim while it comes.
type body struct {
	io.Reader
	claim *claim
	w     http.ResponseWriter
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if n > 0 && !b.claim.read(n, b) {
		return n, errBudget
	}
	return n, err
}

// cut makes Read fail, also one that waits.
func (b *body) cut() { http.NewResponseController(b.w).SetReadDeadline(past) }

// capture reads the request to its end and encodes it: the only copy that is
// kept, and what counts from then on.
func (s *Server) capture(w http.ResponseWriter, r *http.Request, t *requestTarget, c *claim, h *hold) *refusal {
	buf := buffers.Get().(*bytes.Buffer)
	defer recycle(buf)
	if r.ContentLength != 0 {
		buf.Grow(int(min(max(r.ContentLength, 0), 16<<10)) + bytes.MinRead)
		n, err := buf.ReadFrom(&body{http.MaxBytesReader(w, r.Body, s.opts.MaxPayload), c, w})
		h.passage.Bytes = int(n)
		_, large := errors.AsType[*http.MaxBytesError](err)
		switch had := c.set(requestCost); {
		case large:
			return errTooLarge
		case err == errBudget || !had:
			return errBudget
		case err != nil:
			return errIncomplete
		}
	}
	if !s.signed(t.Channel, r, buf.Bytes()) {
		return errSignature
	}
	webhook := &Webhook{
		ID:      newID(s.opts.Replica),
		Method:  r.Method,
		Path:    t.Path,
		Query:   t.Query,
		Headers: endToEnd(r.Header),
		Body:    buf.Bytes(),
		Time:    s.began.Add(time.Since(s.began)),
		Mode:    s.opts.Modes.of(t.Channel),
	}
	if webhook.Scheme = "http"; r.TLS != nil {
		webhook.Scheme = "https"
	}
	if respond(webhook.Mode) {
		webhook.Timeout = s.opts.Timeouts.of(t.Channel)
	}
	if r.Host != "" {
		webhook.Headers = slices.Insert(webhook.Headers, 0, Header{"Host", []string{r.Host}})
	}
	event, ok := newEvent(t.Channel, s.opts.Replica, webhook, s.budget)
	if !ok {
		return errBudget
	}
	if len(event.chunk) >= lineLimit {
		event.release()
		return errTooLarge
	}
	h.event, h.passage.Event = event, event.ID
	return nil
}

// Holds. The package doc tells the life of a webhook: a hold is its entry in the
// memory of the replica that took it. What it is told only ever adds to two
// sets, who was given the event and who has settled, so that receipts, reports
// and the ends of streams may come in any order.

// hold is one webhook that is not done. Server.mu guards it.
type hold struct {
	event   *Event
	passage Passage // as it came
	entry   uint64  // of the status page
	outcome string  // what became of it in accept; empty: accepted
	reason  string  // of outcome
	line    *line
	order   uint64        // among all holds: the oldest first
	since   time.Time     // when it began
	claim   *claim        // of the sender's request, which the answer counts in; nil in accept
	done    chan struct{} // closed when it is; nil in accept, where nobody waits
	refused *refusal      // what the sender is told when there is no answer
	best    *Answer       // of those reported; none in accept

	round    int               // publications so far; only receipts of the last one count
	publish  bool              // one is under way
	receipts int               // that are to come; less than none while more have come than the bus has told of
	parties  map[string]*party // clients that were given it and have not settled
	open     int               // parties with a stream
	settled  map[string]bool   // clients that have reported
	busy     map[string]bool   // clients that ended their streams and will still report
	readers  bool              // one that cannot report was given it
	died     bool              // a client that was given it did not come back
	given    bool              // a client that can report was given it
	strange  int64             // bytes that count in Server.strange
	queue    *waiting          // where it waits
	place    int               // there, from 1; 0: it does not wait
	poke     chan struct{}     // holds a token when the courier has something to look at
}

// party is one client that was given an event and has not settled.
type party struct {
	streams []string  // subscribers that have it; none: all broke, and it may come back
	broke   time.Time // when the last of them did
}

// line is what this replica holds for one channel. Server.mu guards it.
type line struct {
	channel string
	holds   int                           // in Server.holds
	seen    time.Time                     // when somebody was last known to subscribe
	clients time.Time                     // when a client that can report was
	waiting waiting                       // holds that nobody has, the oldest first
	orphans waiting                       // those of them that readers have who cannot report, and a client that died had
	missed  map[string]map[*hold]struct{} // by client whose streams broke: what it has not reported
	back    []string                      // clients that are back, and are given what they missed
	due     int                           // grows whenever somebody may take what waits
	tried   time.Time                     // when the courier last began
	courier bool                          // one is under way
}

// having is one subscriber with events that are not settled.
type having struct {
	replica string
	client  string
	holds   map[*hold]struct{}
}

// deadline is a time at which something is looked at again.
type deadline struct {
	at     time.Time
	events []string // ids
	round  int      // of the receipts that are due
	client string   // whose time to come back ends
}

// waiting is a heap of holds by age (container/heap).
type waiting []*hold

func (q waiting) Len() int           { return len(q) }
func (q waiting) Less(i, j int) bool { return q[i].order < q[j].order }
func (q waiting) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i+1, j+1
}
func (q *waiting) Push(h any) {
	*q = append(*q, h.(*hold))
	h.(*hold).place = len(*q)
}
func (q *waiting) Pop() any {
	last := len(*q) - 1
	h := (*q)[last]
	(*q)[last] = nil
	*q, h.place = (*q)[:last], 0
	return h
}

// begin enters h, unless the server takes nothing new: at its end, and before when
// nobody is left who could get it.
func (s *Server) begin(h *hold) *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.alone && !s.hub.Wants(h.event.Channel) {
		return errLeaving
	}
	s.requests.Add(1)
	s.keep(h)
	return nil
}

// keep gives h its place among all holds. It needs mu.
func (s *Server) keep(h *hold) {
	s.order++
	h.order, h.since = s.order, time.Now()
	h.line = s.line(h.event.Channel)
	h.line.holds++
	s.holds[h.event.ID] = h
	h.entry = s.Note(0, h.passage)
}

// line is the line of channel. It needs mu.
func (s *Server) line(channel string) *line {
	l := s.lines[channel]
	if l == nil {
		l = &line{channel: channel}
		s.lines[channel] = l
	}
	return l
}

// first publishes h for the first time, or lets it wait behind older ones that
// nobody could take. It reports whether h was lost at once.
func (s *Server) first(h *hold) (lost bool, refused *refusal) {
	e := h.event
	s.mu.Lock()
	if len(h.line.waiting) > 0 && s.bus.Check(context.Background()) == nil {
		defer s.mu.Unlock()
		s.wait(h)
		return s.heed(h), nil
	}
	h.round, h.publish = e.Round, true // as it is encoded already
	s.mu.Unlock()
	e.use() // a fast client may settle it before the bus has answered
	defer e.release()
	receivers, err := s.publish(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	unheard := s.holds[e.ID] == h && len(h.settled) == 0    // nobody has reported on it
	if err != nil && unheard && h.open == 0 && !h.readers { // as far as anybody can tell nobody has it
		s.end(h, errBus)
		return false, errBus
	}
	s.published(h, receivers)
	for client, p := range h.parties {
		if len(p.streams) == 0 { // it broke meanwhile, and may be back already
			s.deliverAgain(h.line, client)
		}
	}
	switch {
	case receivers > 0, s.holds[e.ID] != h:
	case s.alone:
		s.end(h, errLeaving)
		return false, errLeaving
	default:
		lost = s.heed(h)
	}
	return lost, nil
}

// publish hands e to the bus, within busTimeout. It does not listen to the sender:
// one that closes its side after the request looks as if it had gone.
func (s *Server) publish(e *Event) (receivers int, err error) {
	ctx := context.Background()
	if s.bus != Bus(s.hub) { // which takes no time
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, busTimeout)
		defer cancel()
	}
	if receivers, err = s.bus.Publish(ctx, e); err != nil {
		e.owner().kept.Store(true) // the bus may still write it
		s.log.Debug("webhook not published", "channel", e.Channel, "event", e.ID, "err", err)
	}
	return receivers, err
}

// published notes that h was published to so many replicas. It needs mu.
func (s *Server) published(h *hold, receivers int) {
	h.publish = false
	h.receipts += receivers
	if receivers > 0 {
		h.line.seen = time.Now()
	}
	if s.holds[h.event.ID] != h {
		return
	}
	if h.receipts > 0 {
		s.awaited = append(s.awaited, deadline{at: time.Now().Add(receiptTimeout), events: []string{h.event.ID}, round: h.round})
	}
	s.weigh(h)
}

// heed ends h, and reports so, if in accept mode nobody will come for it: neither
// are there subscribers for its channel, nor were there lately; or, while it cannot
// know that, there is no space left for strangers. It needs mu.
func (s *Server) heed(h *hold) (lost bool) {
	now, size := time.Now(), holdCost+int64(len(h.event.wire))
	switch {
	case h.event.Mode != modeAccept, !h.line.seen.IsZero() && now.Sub(h.line.seen) < s.opts.HoldTime:
	case now.Sub(s.unsure) < s.opts.HoldTime && s.strange+size <= s.budget.Limit/strangeShare:
		h.strange = size
		s.strange += size
	default:
		s.lose(h, "unknown_channel")
		return true
	}
	return false
}

// weigh ends h if it is done, and lets it wait for a subscriber if nobody has
// it. It needs mu.
func (s *Server) weigh(h *hold) {
	reported := len(h.settled) > 0
	switch {
	case s.holds[h.event.ID] != h:
	case h.best != nil && h.best.Status/100 == 2: // the first success
		s.end(h, nil)
	case h.publish || h.receipts > 0: // there may be more who were given it
	case h.open > 0, (reported || len(h.busy) > 0) && len(h.parties) > 0: // who has it, or broke and may come back, may say better
		s.unwait(h)
	case reported, h.readers && !h.died && len(h.parties) == 0:
		s.end(h, nil)
	default:
		s.wait(h)
	}
}

// wait lets h wait for somebody who can take it, and unwait ends that. They
// need mu.
func (s *Server) wait(h *hold) {
	if h.place == 0 {
		h.queue = &h.line.waiting
		if h.readers {
			h.queue = &h.line.orphans
		}
		heap.Push(h.queue, h)
	}
}

func (s *Server) unwait(h *hold) {
	if h.place > 0 {
		heap.Remove(h.queue, h.place-1)
	}
}

// end forgets h. refused is what its sender is told, unless there is an answer.
// It needs mu.
func (s *Server) end(h *hold, refused *refusal) {
	if s.holds[h.event.ID] != h {
		return
	}
	delete(s.holds, h.event.ID)
	for client := range h.parties {
		s.settle(h, client)
	}
	s.unwait(h)
	if h.line.holds--; h.line.holds == 0 && h.line.seen.IsZero() {
		delete(s.lines, h.line.channel)
	}
	s.strange -= h.strange
	h.refused = refused
	h.event.release()
	if h.done != nil {
		close(h.done)
	} else if refused == nil { // its provider was answered before
		s.conclude(h)
	}
	wake(h.poke)
}

// conclude tells what became of a webhook of accept. It needs mu.
func (s *Server) conclude(h *hold) {
	p := h.passage.became(cmp.Or(h.outcome, outcomeAccepted), h.reason)
	p.Status, p.Attempt = http.StatusOK, h.round
	switch p.Outcome {
	case outcomeAccepted:
		s.Accepted.Add(1)
		s.Taken.Observe(p.took())
	case outcomeLost:
		s.Lost[p.Reason].Add(1)
		p.tell(s.log, slog.LevelWarn, "webhook lost", slog.String("channel", p.Channel), slog.String("reason", p.Reason))
	}
	s.Note(h.entry, p)
}

// settle takes client out of those who have yet to settle h. It needs mu.
func (s *Server) settle(h *hold, client string) {
	p := h.parties[client]
	if p == nil {
		return
	}
	if len(p.streams) > 0 {
		h.open--
	} else {
		h.line.found(client, h)
	}
	for _, id := range p.streams {
		if has := s.having[id]; has != nil {
			if delete(has.holds, h); len(has.holds) == 0 {
				delete(s.having, id)
			}
		}
	}
	delete(h.parties, client)
}

// miss and found keep what a client whose streams broke has not reported. They
// need Server.mu.
func (l *line) miss(client string, h *hold) {
	if l.missed == nil {
		l.missed = map[string]map[*hold]struct{}{}
	}
	if l.missed[client] == nil {
		l.missed[client] = map[*hold]struct{}{}
	}
	l.missed[client][h] = struct{}{}
}

func (l *line) found(client string, h *hold) {
	if delete(l.missed[client], h); len(l.missed[client]) == 0 {
		delete(l.missed, client)
	}
}

// signal takes what replicas tell each other about holds. It never blocks: the
// bus calls it from its receiving loop.
func (s *Server) signal(sig Signal) {
	switch sig.Kind {
	case signalReceipt:
		s.receipt(&sig)
	case signalReport:
		if sig.To == s.opts.Replica && s.handedOver(sig.Event) {
			sig.To, sig.From = "", s.opts.Replica
			s.bus.Tell(sig)
		} else if _, a, err := newReports(bytes.NewReader(sig.Data)).next(s.waits); err == nil {
			s.reported(sig.Event, sig.Channel, sig.Client, &a)
		}
	case signalReady:
		s.ready(&sig)
	case signalLeft:
		s.mu.Lock()
		s.line(sig.Channel).seen = time.Now() // it stays known for a while
		s.left(sig.Subscriber)
		s.mu.Unlock()
	case signalGone:
		s.gone(sig.From)
	case signalAgain:
		s.interrupted(sig.From)
	case signalHand:
		s.take(&sig)
	}
}

// receipt notes to whom an event was given.
func (s *Server) receipt(sig *Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.holds[sig.Event]
	if h == nil {
		return
	}
	if sig.Round == h.round {
		h.receipts--
	}
	for _, g := range sig.Given {
		switch {
		case g.Client == "":
			if !h.readers {
				s.unwait(h) // it may only go to clients now
				h.readers = true
			}
		case h.settled[g.Client]: // its report was faster
			h.given = true
		default:
			h.given = true
			h.line.clients = time.Now()
			s.give(h, g, sig.From)
		}
	}
	s.weigh(h)
	wake(h.poke)
}

// give notes that a subscriber of replica has the event of h. It needs mu.
func (s *Server) give(h *hold, g Given, replica string) {
	p := h.parties[g.Client]
	_, departed := s.departed[g.Subscriber]
	departed = departed || s.away[replica]
	switch {
	case p == nil:
		if h.parties == nil {
			h.parties = map[string]*party{}
		}
		p = &party{}
		h.parties[g.Client] = p
		if departed { // its end was faster
			s.broken(h, g.Client, p)
			s.comeBack(g.Client, []string{h.event.ID})
			return
		}
	case departed || slices.Contains(p.streams, g.Subscriber):
		return
	case len(p.streams) == 0:
		h.line.found(g.Client, h)
	}
	if len(p.streams) == 0 {
		h.open++
	}
	p.streams = append(p.streams, g.Subscriber)
	has := s.having[g.Subscriber]
	if has == nil {
		has = &having{replica: replica, client: g.Client, holds: map[*hold]struct{}{}}
		s.having[g.Subscriber] = has
	}
	has.holds[h] = struct{}{}
}

// broken notes that client has lost all its streams with the event of h. It
// needs mu.
func (s *Server) broken(h *hold, client string, p *party) {
	p.broke = time.Now()
	h.line.miss(client, h)
}

// waits reports whether the event id is held here.
func (s *Server) waits(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holds[id] != nil
}

// handedOver reports whether the event id, which was held here, is not any more
// because another replica may hold it now.
func (s *Server) handedOver(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over && s.holds[id] == nil
}

// reported gives a client's report to the hold that waits for it, if any.
func (s *Server) reported(id, channel, client string, a *Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.holds[id]
	if h == nil || h.event.Channel != channel || client == "" { // who does not name himself was given nothing to report on
		return
	}
	if a.Err == answerTaken {
		if h.busy == nil {
			h.busy = map[string]bool{}
		}
		h.busy[client] = true
		s.weigh(h)
		return
	}
	if h.done != nil && (h.best == nil || a.rank() < h.best.rank()) {
		h.claim.add(a.size() - h.best.size()) // whatever the limit: it is what makes space
		h.best = a
	}
	if h.settled == nil {
		h.settled = map[string]bool{}
	}
	h.settled[client] = true
	s.settle(h, client)
	s.weigh(h)
}

// left settles a subscriber whose stream has ended. It needs mu.
func (s *Server) left(id string) {
	if _, known := s.departed[id]; !known {
		s.departed[id] = struct{}{}
		s.late = append(s.late, id)
		if len(s.late) > departedLimit {
			delete(s.departed, s.late[0])
			s.late = s.late[1:]
		}
	}
	s.strip(id)
}

// strip takes from a subscriber all that it has. Whoever is there may take it,
// above all another stream of the same client. It needs mu.
func (s *Server) strip(id string) {
	has := s.having[id]
	if has == nil {
		return
	}
	delete(s.having, id)
	var broke []string
	var l *line
	for h := range has.holds {
		p := h.parties[has.client]
		p.streams = slices.DeleteFunc(p.streams, func(other string) bool { return other == id })
		if len(p.streams) == 0 {
			h.open--
			s.broken(h, has.client, p)
			broke, l = append(broke, h.event.ID), h.line
			s.weigh(h)
		}
	}
	if l != nil {
		s.comeBack(has.client, broke)
		s.deliverAgain(l, has.client)
	}
}

// comeBack gives client its time to come back for events. It needs mu.
func (s *Server) comeBack(client string, events []string) {
	s.returns = append(s.returns, deadline{at: time.Now().Add(returnTime), events: events, client: client})
}

// gone ends all subscribers of a replica that is no more.
func (s *Server) gone(replica string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unsure = time.Now() // nobody says which channels its subscribers had
	if len(s.away) >= awayLimit {
		clear(s.away)
	}
	s.away[replica] = true
	for id, has := range s.having {
		if has.replica == replica {
			s.strip(id)
		}
	}
	var ask []string // who has what it handed over: their reports may have gone with it
	for id, h := range s.holds {
		if replicaOf(id) == replica {
			for _, p := range h.parties {
				ask = append(ask, p.streams...)
			}
		}
	}
	for _, id := range ask {
		s.strip(id)
	}
}

// ready notes that a client may take what waits, and what it has missed.
func (s *Server) ready(sig *Signal) {
	if sig.Client != "" && sig.Subscriber != "" {
		s.hub.Replace(sig.Channel, sig.Client, sig.Subscriber)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.line(sig.Channel)
	if l.seen = time.Now(); sig.Client != "" {
		l.clients = l.seen
	}
	s.deliverAgain(l, sig.Client)
}

// interrupted lets be published again what may not have got through while the bus was
// away for replica: nobody counts as having an event until he says so anew. That
// is what its subscribers have, and everything when the replica is this one.
func (s *Server) interrupted(replica string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	own := replica == s.opts.Replica
	s.unsure = time.Now()
	delete(s.away, replica)
	for id, has := range s.having {
		if own || has.replica == replica {
			s.strip(id) // it may well be there, and not have departed
		}
	}
	for _, h := range s.holds {
		if own && !h.publish {
			if h.receipts = 0; len(h.settled) > 0 {
				s.weigh(h)
			} else {
				s.wait(h)
			}
			wake(h.poke)
		}
	}
	for _, l := range s.lines {
		s.deliverAgain(l, "")
	}
}

// take holds from now on what a replica that leaves has handed over.
func (s *Server) take(sig *Signal) {
	if s.passOn(sig) {
		return
	}
	e, err := openEvent(sig.Channel, sig.Data)
	if err != nil {
		s.log.Warn("webhook that was handed over refused", "channel", sig.Channel, "err", err)
		return
	}
	kept, ok := s.budget.claim(e.Channel, holdCost+int64(len(e.wire)))
	if !ok {
		s.Lost["no_space"].Add(1)
		s.log.Warn("webhook lost", "event", e.ID, "channel", e.Channel, "reason", "no_space")
		return
	}
	e.claim, e.Mode = kept, modeAccept // nothing else is handed over
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.holds[e.ID] != nil {
		e.release()
		return
	}
	orphan := sig.Client != "" // readers have it, and it would be done if no client had died
	h := &hold{event: e, readers: orphan, died: orphan, passage: Passage{Event: e.ID, Channel: e.Channel, Time: time.Now(), Outcome: outcomeHeld}}
	s.keep(h)
	h.line.seen, h.line.tried = time.Now(), time.Now() // look publishes it a little later: a report may be on its way
	s.wait(h)
}

// passOn hands on what came too late, when nothing is held here any more; it
// reports whether that is so. sig.Round counts the replicas it came to before.
func (s *Server) passOn(sig *Signal) bool {
	s.mu.Lock()
	over, heirs := s.over, slices.DeleteFunc(slices.Clone(s.heirs), func(name string) bool { return name == sig.From })
	s.mu.Unlock()
	switch {
	case !over:
	case len(heirs) > 0 && sig.Round < passLimit:
		next := *sig
		next.From, next.To, next.Round = s.opts.Replica, heirs[mathrand.N(len(heirs))], sig.Round+1
		s.bus.Tell(next)
	default:
		s.Lost["shutdown"].Add(1)
		s.log.Warn("webhook lost", "event", sig.Event, "channel", sig.Channel, "reason", "shutdown")
	}
	return over
}

// deliverAgain sees that what waits in l is published again, and to client what
// it has missed. It needs mu.
func (s *Server) deliverAgain(l *line, client string) {
	l.due++
	if len(l.missed[client]) > 0 && !slices.Contains(l.back, client) {
		l.back = append(l.back, client)
	}
	if !l.courier && !s.over && len(l.waiting)+len(l.orphans)+len(l.back) > 0 {
		l.courier = true
		l.tried = time.Now()
		s.couriers.Go(func() { s.courier(l) })
	}
}

// courier publishes again what waits in l, the oldest first and no further than
// the first that nobody could take, so that a thousand holds are not published a
// thousand times. It ends when nobody takes anything, or has become ready since.
func (s *Server) courier(l *line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for more := true; more && !s.over; {
		due := l.due
		for len(l.back) > 0 {
			client := l.back[0]
			l.back = l.back[1:]
			s.restore(l, client)
		}
		taken := s.offer(&l.waiting, "")
		more = s.offer(&l.orphans, onlyReporters) || taken || l.due != due
	}
	l.courier = false
}

// offer publishes the oldest of q once more, and reports whether somebody took
// it. It needs mu, which it gives up meanwhile.
func (s *Server) offer(q *waiting, only string) bool {
	if len(*q) == 0 || s.over {
		return false
	}
	h := (*q)[0]
	s.republish(h, only)
	return h.place == 0 || h.queue != q
}

// restore gives client, which is back, what it has missed, until it can take no
// more. It needs mu, which it gives up meanwhile.
func (s *Server) restore(l *line, client string) {
	missed := slices.SortedFunc(maps.Keys(l.missed[client]), func(a, b *hold) int { return cmp.Compare(a.order, b.order) })
	for _, h := range missed {
		p := h.parties[client]
		if p == nil || len(p.streams) > 0 || h.publish || s.over {
			continue
		}
		s.republish(h, client)
		if h.parties[client] == p && len(p.streams) == 0 {
			return
		}
	}
}

// republish publishes h once more and waits for the receipts. It needs mu, which
// it gives up meanwhile.
func (s *Server) republish(h *hold, only string) {
	h.round++
	h.publish, h.receipts = true, 0
	h.poke = make(chan struct{}, 1)
	e := h.event.repeat(s.opts.Replica, h.round, only)
	e.use() // it may be settled meanwhile
	s.mu.Unlock()
	receivers, _ := s.publish(e)
	e.release()
	s.mu.Lock()
	s.published(h, receivers)
	for h.receipts > 0 && s.holds[e.ID] == h {
		s.mu.Unlock()
		<-h.poke // a receipt, that none will come, or the end
		s.mu.Lock()
	}
}

// look does what is due by now: receipts that will not come, clients that do not
// come back, what nobody took and nobody asked for, and what no client was there
// for in time.
func (s *Server) look(now time.Time) {
	down := s.bus.Check(context.Background()) != nil
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.awaited) > 0 && !s.awaited[0].at.After(now) {
		d := s.awaited[0]
		s.awaited = s.awaited[1:]
		if h := s.holds[d.events[0]]; h != nil && h.round == d.round && h.receipts > 0 {
			h.receipts = 0 // who took it was no replica, or is none any more
			s.weigh(h)
			wake(h.poke)
		}
	}
	for len(s.returns) > 0 && !s.returns[0].at.After(now) {
		d := s.returns[0]
		s.returns = s.returns[1:]
		for _, id := range d.events {
			h := s.holds[id]
			if h == nil {
				continue
			}
			if p := h.parties[d.client]; p != nil && len(p.streams) == 0 && now.Sub(p.broke) >= returnTime {
				h.died = true
				delete(h.busy, d.client)
				s.settle(h, d.client)
				s.weigh(h)
			}
		}
	}
	for channel, l := range s.lines {
		if !down && !s.over {
			s.drop(l, now)
		}
		switch {
		case len(l.waiting)+len(l.orphans) > 0 && now.Sub(l.tried) >= retryInterval:
			s.deliverAgain(l, "")
		case l.holds == 0 && !l.courier && now.Sub(l.seen) > s.opts.HoldTime:
			delete(s.lines, channel)
		}
	}
}

// drop ends what has waited in l for SERVER_HOLD_TIME without a client. It needs
// mu.
func (s *Server) drop(l *line, now time.Time) {
	for q, seen := range map[*waiting]time.Time{&l.waiting: l.seen, &l.orphans: l.clients} {
		for len(*q) > 0 {
			h := (*q)[0]
			if h.event.Mode != modeAccept || h.publish || h.receipts > 0 || now.Sub(h.since) < s.opts.HoldTime || now.Sub(seen) < s.opts.HoldTime {
				break
			}
			s.lose(h, "no_client")
		}
	}
}

// lose ends h, which was accepted and will not arrive. It needs mu.
func (s *Server) lose(h *hold, reason string) {
	if h.strange > 0 { // nobody ever subscribed
		reason = "unknown_channel"
	}
	h.outcome, h.reason = outcomeLost, reason
	s.end(h, nil)
}

// waitsFor reports whether something held waits for a subscriber of channel.
func (s *Server) waitsFor(channel string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lines[channel]
	return l != nil && (len(l.waiting)+len(l.orphans) > 0 || l.courier)
}

// settled reports whether nothing is held that can still be settled here: that a
// client has, or had, and may report; or, with peers, what a sender waits for and
// a client of theirs may take.
func (s *Server) settled(peers bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.holds {
		if h.publish || h.receipts > 0 || len(h.parties) > 0 || peers && h.done != nil {
			return false
		}
	}
	return true
}

// handOver gives what is still held for accept to another replica; without one
// it is lost.
func (s *Server) handOver(peers []string, end time.Time) {
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	s.mu.Lock()
	s.over, s.heirs = true, peers
	var left []*hold
	for _, h := range s.holds {
		switch {
		case h.done != nil:
		case len(h.settled) > 0: // only one that broke may want it, too; another replica would give it to all
			s.end(h, nil)
		default:
			h.event.use()
			left = append(left, h)
		}
	}
	slices.SortFunc(left, func(a, b *hold) int { return cmp.Compare(a.order, b.order) })
	s.mu.Unlock()
	handed := 0
	for _, h := range left {
		e, taken := h.event, 0
		hand := Signal{Kind: signalHand, From: s.opts.Replica, Channel: e.Channel, Event: e.ID, Data: e.message()}
		if h.readers {
			hand.Client = onlyReporters // legacy readers have it
		}
		for i := 0; i < len(peers) && taken == 0; i++ {
			hand.To = peers[i]
			taken, _ = s.bus.Send(ctx, hand)
		}
		s.mu.Lock()
		if taken > 0 {
			handed++
			h.outcome = "handed over"
			s.end(h, nil)
		} else {
			s.lose(h, "shutdown")
		}
		s.mu.Unlock()
		e.release()
	}
	if handed > 0 {
		s.log.Info("holds handed over", "count", handed)
	}
}

// reply waits until h is done, or its sender's time is over, and answers unless
// that is the relay's to do.
func (s *Server) reply(w http.ResponseWriter, r *http.Request, h *hold) (status int, refused *refusal) {
	e := h.event
	http.NewResponseController(w).SetWriteDeadline(e.Until.Add(replyTimeout))
	timer := time.NewTimer(time.Until(e.Until))
	defer timer.Stop()
	select {
	case <-h.done:
	case <-timer.C:
		s.expire(h, errNobody)
	case <-r.Context().Done():
		s.expire(h, errGone)
	case <-s.giveUp:
		s.expire(h, errLeaving)
	}
	answer := h.best // nobody changes them once h is done
	refused = h.refused
	switch {
	case answer == nil: // with no refusal either only those have it who cannot report
	case answer.Err == answerUnreachable:
		refused = errUnreachable
	case answer.Err != "":
		refused = errNoAnswer
	}
	if refused != nil {
		return 0, refused
	}
	if answer == nil {
		answer = &Answer{Status: http.StatusOK}
	}
	header := w.Header()
	header["Content-Type"] = nil // net/http must not guess one
	var said []byte
	if e.Mode == modeResponse {
		public(header, answer.Headers, r.Header["Origin"] != nil)
		said = answer.Body
	}
	if r.Method != http.MethodHead && answer.Status != http.StatusNoContent && answer.Status != http.StatusNotModified {
		header.Set("Content-Length", strconv.Itoa(len(said)))
	}
	w.WriteHeader(answer.Status)
	w.Write(said)
	return answer.Status, nil
}

// expire ends h because its sender waits no longer: with the best that was
// reported, or for the reason why; a client that has it had no answer in time.
func (s *Server) expire(h *hold, why *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case h.best != nil:
		why = nil
	case why == errNobody && h.given:
		why = errNoAnswer
	}
	s.end(h, why)
}

// private lists what a target may say to its own proxy or its own browsers, but
// not on the relay's host; a name that ends in "*" stands for all that begin so.
var private = []string{
	"X-Accel-*", "X-Sendfile*", // nginx, Apache and lighttpd would serve files of the relay's host
	"Strict-Transport-Security", "Clear-Site-Data", "Alt-Svc", "Service-Worker-Allowed", "Refresh",
}

// public puts the fields of a target's answer into header as far as they
// concern the provider alone. Access-Control fields are for a browser that
// sent an Origin. What comes from inside is neither kept by caches nor sniffed.
func public(header http.Header, fields []Header, origin bool) {
	for _, f := range fields {
		if !slices.ContainsFunc(private, func(name string) bool {
			begin, all := strings.CutSuffix(name, "*")
			return f.Name == name || all && strings.HasPrefix(strings.ToLower(f.Name), strings.ToLower(begin))
		}) && (origin || !strings.HasPrefix(f.Name, "Access-Control-")) {
			header[f.Name] = f.Values
		}
	}
	if header["Cache-Control"] == nil {
		header["Cache-Control"] = []string{"no-store"}
	}
	header["X-Content-Type-Options"] = []string{"nosniff"}
}

// serveReport takes what a client reports on one or more events, as HTTP
// responses one after the other. What nobody waits for any more is no mistake.
func (s *Server) serveReport(w http.ResponseWriter, r *http.Request, channel string) {
	if _, _, ok := s.authorise(w, r, http.MethodPost, channel); !ok {
		return
	}
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(reportTime)) // one that stalls keeps out others
	claim, ok := s.reports.claim(channel, 0)
	if !ok {
		s.reject(w, r, channel, errBudget, nil)
		return
	}
	defer claim.end()
	client, list := clientName(r), newReports(&body{http.MaxBytesReader(w, r.Body, reportLimit), claim, w})
	wanted := func(id string) bool { return replicaOf(id) != s.opts.Replica || s.waits(id) }
	var away error // the bus does not take reports: only those are taken that wait here
	for n := 0; ; n++ {
		id, answer, err := list.next(wanted)
		switch {
		case err == io.EOF && away != nil:
			s.reject(w, r, channel, errBus, away)
			return
		case err == io.EOF && n > 0:
			w.WriteHeader(http.StatusNoContent)
			return
		case errors.Is(err, errBudget):
			s.reject(w, r, channel, errBudget, nil)
			return
		case err != nil:
			s.reject(w, r, channel, errReport, err)
			return
		case away == nil || replicaOf(id) == s.opts.Replica:
			away = cmp.Or(s.route(r.Context(), id, channel, client, answer), away)
		}
	}
}

// route brings an answer to the replica that holds its event, here or elsewhere;
// when that is gone, to whoever has taken it over.
func (s *Server) route(ctx context.Context, id, channel, client string, a Answer) error {
	to := replicaOf(id)
	if to == s.opts.Replica {
		if !s.handedOver(id) {
			s.reported(id, channel, client, &a)
			return nil
		}
		to = ""
	}
	if err := s.bus.Check(ctx); err != nil {
		return err // the next try may find a replica that is well, and others may wait behind it
	}
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	var data bytes.Buffer
	a.appendReport(&data, id)
	sig := Signal{Kind: signalReport, To: to, From: s.opts.Replica, Channel: channel, Event: id, Client: client, Data: data.Bytes()}
	receivers, err := s.bus.Send(ctx, sig)
	if err == nil && receivers == 0 && to != "" {
		sig.To = ""
		_, err = s.bus.Send(ctx, sig)
	}
	return err
}

// Who may send, who may subscribe, and from where.

// watched is a file whose value is read again when it changes, or two that are right
// only together. What cannot be right leaves the last good value in force. It is
// safe for concurrent use.
type watched[T any] struct {
	variable string                       // that names the file
	name     string                       // empty: there is none, and the value stays T's zero
	second   string                       // a key, which goes with what is in the first; empty: there is one alone
	parse    func(text string) (T, error) // of both, with a NUL between

	inForce atomic.Pointer[T]

	mu sync.Mutex

	// Guarded by mu.
	taken [32]byte // sum of what is in force
	seen  [32]byte // sum at the last look; zero when that failed
	bad   [32]byte // sum of what was refused last
	why   error    // it was
	told  string   // the last error, which is told once
}

// value is what is in force.
func (w *watched[T]) value() (v T) {
	if p := w.inForce.Load(); p != nil {
		v = *p
	}
	return v
}

// look reads the file, and reports whether it put a new value in force. A writer
// may still be at work on a file whose last line is not complete, and half a line
// must not count: such a file is taken once two looks that follow each other find
// the same. A pair that is cut does not fit. It needs mu once others know w.
func (w *watched[T]) look() (bool, error) {
	before := w.seen
	w.seen = [32]byte{}
	text, whole, err := readWhole(w.name)
	if err == nil && w.second != "" {
		var key string
		key, _, err = readWhole(w.second)
		text, whole = text+"\x00"+key, true
	}
	if err != nil {
		return false, err
	}
	sum := sha256.Sum256([]byte(text))
	if sum == w.bad {
		return false, w.why
	}
	if sum != w.taken {
		value, err := w.parse(text)
		if err != nil {
			w.bad, w.why = sum, err
			return false, err
		}
		if whole || sum == before {
			w.taken, w.seen = sum, sum
			w.inForce.Store(&value)
			return true, nil
		}
	}
	w.seen = sum
	return false, nil
}

// readWhole reads a watched file, and whether its last line has an end. What is no
// file, such as a pipe, is not read: it may never end.
func readWhole(name string) (text string, whole bool, err error) {
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%q is not a regular file", name)
	}
	if err != nil {
		return "", false, err
	}
	f, err := os.Open(name)
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, watchedLimit+1))
	if err == nil && len(data) > watchedLimit {
		err = fmt.Errorf("%q is larger than %d bytes", name, watchedLimit)
	}
	return string(data), bytes.HasSuffix(data, []byte("\n")), err
}

// open waits until the file is in force for the first time.
func (w *watched[T]) open() error {
	if w.name == "" {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for end := time.Now().Add(settleTime); ; time.Sleep(settleInterval) {
		taken, err := w.look()
		if !taken && err == nil && !time.Now().Before(end) {
			err = errors.New("its last line has no end, and it keeps changing")
		}
		if err != nil {
			return fmt.Errorf("%s: %q: %w", w.variable, strings.TrimSpace(w.name+" "+w.second), err)
		}
		if taken {
			return nil
		}
	}
}

// reload looks whether the file has changed, and reports whether a new value is in
// force.
func (w *watched[T]) reload(log *slog.Logger) bool {
	if w.name == "" {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	taken, err := w.look()
	told := ""
	if err != nil {
		told = err.Error()
	}
	if told != "" && told != w.told {
		log.Error("file kept as it was", "variable", w.variable, "err", err)
	}
	if w.told = told; taken {
		log.Info("file read again", "variable", w.variable)
	}
	return taken
}

// fresh is the value after one more look.
func (w *watched[T]) fresh(log *slog.Logger) T {
	w.reload(log)
	return w.value()
}

// parseLines reads lines that begin with a channel, or "*" for any; read makes
// something of the words behind, and "#" begins a comment line. Its errors name
// lines, never their text. A file that says nothing is an error, so that a
// truncated one never takes force.
func parseLines[T any](text string, read func(words []string) (T, error)) (all byChannel[[]T], err error) {
	all.Named = map[string][]T{}
	number := 0
	for line := range strings.Lines(strings.TrimPrefix(text, "\uFEFF")) {
		number++
		words := strings.Fields(line)
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		channel := words[0]
		if channel != "*" && !validName(channel) {
			return all, fmt.Errorf("line %d: invalid channel", number)
		}
		one, err := read(words[1:])
		if err != nil {
			return all, fmt.Errorf("line %d: %w", number, err)
		}
		if channel == "*" {
			all.Default = append(all.Default, one)
		} else {
			all.Named[channel] = append(all.Named[channel], one)
		}
	}
	if len(all.Default)+len(all.Named) == 0 {
		return all, errors.New("says nothing")
	}
	return all, nil
}

// parseTokens reads lines of "channel token". Tokens are kept as hashes.
func parseTokens(text string) (byChannel[[][32]byte], error) {
	return parseLines(text, func(words []string) (hash [32]byte, err error) {
		if len(words) != 1 {
			return hash, errors.New("want a channel and a token")
		}
		return sha256.Sum256([]byte(words[0])), nil
	})
}

// parseSecrets reads lines of "channel scheme secret", maybe with unsigned-get
// behind.
func parseSecrets(text string) (byChannel[[]secret], error) {
	return parseLines(text, func(words []string) (one secret, err error) {
		if n := len(words); n > 0 && words[n-1] == unsignedGet {
			one.unsignedGet, words = true, words[:n-1]
		}
		if len(words) != 2 {
			return one, errors.New("want a channel, a scheme, a secret, and maybe " + unsignedGet)
		}
		if one.scheme, err = schemeOf(words[0]); err != nil {
			return one, err
		}
		if one.key = []byte(words[1]); one.coded != "" {
			if one.key, err = base64.StdEncoding.DecodeString(strings.TrimPrefix(words[1], one.coded)); err != nil || len(one.key) == 0 {
				return one, fmt.Errorf("want a secret in base64, behind %s or not", one.coded)
			}
		}
		return one, nil
	})
}

// parseIssuers reads PEM certificates of those who may issue certificates to
// subscribers. All of them must be right: one that is cut would lock its
// subscribers out.
func parseIssuers(text string) (*x509.CertPool, error) {
	pool, rest, blocks := x509.NewCertPool(), []byte(text), strings.Count(text, "-----BEGIN ")
	if blocks == 0 {
		return nil, errors.New("must hold PEM certificates")
	}
	for range blocks {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("must hold PEM certificates, and nothing else in PEM")
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		pool.AddCert(certificate)
	}
	return pool, nil
}

// keyPair is a certificate and its key, which variables name.
func keyPair(variables, certFile, keyFile string) *watched[*tls.Certificate] {
	return &watched[*tls.Certificate]{variable: variables, name: certFile, second: keyFile, parse: func(text string) (*tls.Certificate, error) {
		cert, key, _ := strings.Cut(text, "\x00")
		pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
		return &pair, err
	}}
}

// secret is what a provider signs a channel's webhooks with.
type secret struct {
	scheme
	key         []byte
	unsignedGet bool // methods without a body pass unsigned
}

// unsignedGet is the word for it.
const unsignedGet = "unsigned-get"

// scheme is how a provider signs: with HMAC-SHA256 (RFC 2104) of what before says,
// and the body.
type scheme struct {
	name   string
	header string // of the signatures; empty: the line names it behind the scheme

	between string // separates the elements of that header; empty: it is one element
	prefix  string // of an element that is a signature
	bare    bool   // it may be missing
	decode  func(string) ([]byte, error)

	id     string        // header that is signed too
	stamp  string        // likewise, Unix time; or the prefix of an element that is
	age    time.Duration // most that this may be from now
	before string        // signed before the body; {id} and {stamp} stand for these

	plain bool   // instead of all that, the signature is the secret itself
	coded string // the secret is in base64, behind this or not; empty: it is taken as it is
}

// schemes is every scheme that a line can name, as the providers document it.
var schemes = []scheme{
	// https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
	{name: "github", header: "X-Hub-Signature-256", prefix: "sha256=", decode: hex.DecodeString},
	// https://docs.gitlab.com/user/project/integrations/webhooks/ (secret token; its signing token is standard-webhooks)
	{name: "gitlab", header: "X-Gitlab-Token", plain: true, decode: asIs},
	// https://support.atlassian.com/bitbucket-cloud/docs/manage-webhooks/
	{name: "bitbucket", header: "X-Hub-Signature", prefix: "sha256=", decode: hex.DecodeString},
	// https://docs.gitea.com/usage/repository/webhooks
	{name: "gitea", header: "X-Gitea-Signature", decode: hex.DecodeString},
	// https://docs.stripe.com/webhooks/signatures
	{name: "stripe", header: "Stripe-Signature", between: ",", prefix: "v1=", decode: hex.DecodeString,
		stamp: "t=", age: signatureAge, before: "{stamp}."},
	// https://docs.slack.dev/authentication/verifying-requests-from-slack
	{name: "slack", header: "X-Slack-Signature", prefix: "v0=", decode: hex.DecodeString,
		stamp: "X-Slack-Request-Timestamp", age: signatureAge, before: "v0:{stamp}:"},
	// https://shopify.dev/docs/apps/build/webhooks/verify-deliveries
	{name: "shopify", header: "X-Shopify-Hmac-Sha256", decode: base64.StdEncoding.DecodeString},
	// https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
	{name: "standard-webhooks", header: "Webhook-Signature", between: " ", prefix: "v1,", decode: base64.StdEncoding.DecodeString,
		id: "Webhook-Id", stamp: "Webhook-Timestamp", age: signatureAge, before: "{id}.{stamp}.", coded: "whsec_"},
	// for everybody else who signs the body alone
	{name: "hmac-sha256", prefix: "sha256=", bare: true, decode: hexOrBase64},
}

// schemeOf is the scheme that word names.
func schemeOf(word string) (scheme, error) {
	name, header, named := strings.Cut(word, ":")
	var names []string
	for _, s := range schemes {
		switch {
		case s.name == name && s.header != "" && !named:
			return s, nil
		case s.name == name && s.header == "" && isToken(header) && !strings.EqualFold(header, "Host"): // which is none to net/http
			s.header = http.CanonicalHeaderKey(header)
			return s, nil
		case s.header == "":
			s.name += ":Header-Name"
		}
		names = append(names, s.name)
	}
	return scheme{}, errors.New("want a scheme: " + strings.Join(names, ", "))
}

func asIs(s string) ([]byte, error) { return []byte(s), nil }

// hexOrBase64 tells the two by the length of a digest.
func hexOrBase64(s string) ([]byte, error) {
	if len(s) == hex.EncodedLen(sha256.Size) {
		return hex.DecodeString(s)
	}
	return base64.StdEncoding.DecodeString(s)
}

// signed reports whether a webhook may come into channel: it is signed with one of
// its secrets, or needs no signature.
func (s *Server) signed(channel string, r *http.Request, body []byte) bool {
	secrets := s.secrets.value().of(channel)
	if len(secrets) == 0 {
		return true
	}
	bodyless := len(body) == 0 && slices.Contains([]string{http.MethodGet, http.MethodHead, http.MethodOptions}, r.Method)
	now := time.Now()
	return slices.ContainsFunc(secrets, func(one secret) bool {
		return bodyless && one.unsignedGet || one.verifies(r.Header, body, now)
	})
}

// verifies reports whether header holds a signature of body that was made with the
// secret, in a time that does not depend on how much of it is right. Fields that
// come twice are refused: the target might read the other one.
func (k *secret) verifies(header http.Header, body []byte, now time.Time) bool {
	elements, stamps, ids := header[k.header], header[k.stamp], header[k.id]
	if len(elements) != 1 {
		return false
	}
	if k.between != "" {
		elements = strings.Split(elements[0], k.between)
	}
	var given [][]byte
	for _, e := range elements {
		if stamp, ok := strings.CutPrefix(e, k.stamp); ok && k.stamp != "" {
			stamps = append(stamps, stamp)
			continue
		}
		text, ok := strings.CutPrefix(e, k.prefix)
		if signature, err := k.decode(text); err == nil && (ok || k.bare) {
			given = append(given, signature)
		}
	}
	before := k.before
	if k.stamp != "" {
		if len(stamps) != 1 {
			return false
		}
		seconds, err := strconv.ParseInt(stamps[0], 10, 64)
		if err != nil || now.Sub(time.Unix(seconds, 0)).Abs() > k.age {
			return false
		}
		before = strings.ReplaceAll(before, "{stamp}", stamps[0])
	}
	if k.id != "" {
		if len(ids) != 1 || strings.Contains(ids[0], ".") { // which ends it in what is signed
			return false
		}
		before = strings.ReplaceAll(before, "{id}", ids[0])
	}
	want := k.key
	if !k.plain {
		if len(given) == 0 { // not worth a hash
			return false
		}
		mac := hmac.New(sha256.New, k.key)
		io.WriteString(mac, before)
		mac.Write(body)
		want = mac.Sum(nil)
	}
	found := false
	for _, signature := range given {
		found = hmac.Equal(signature, want) || found
	}
	return found
}

// denies is why a subscriber with such a credential may not have channel; nil if
// it may.
func (s *Server) denies(channel string, c Credential) *refusal {
	switch {
	case s.opts.ClientCAFile != "" && !issued(c.Certificates, s.issuers.value()):
		return errCertificate
	case !s.opens(channel, c.Token):
		return errToken
	}
	return nil
}

// issued reports whether the first of a connection's certificates, whose key TLS
// has seen it use, is one that roots issued for clients.
func issued(certificates []*x509.Certificate, roots *x509.CertPool) bool {
	if len(certificates) == 0 {
		return false
	}
	between := x509.NewCertPool()
	for _, c := range certificates[1:] {
		between.AddCert(c)
	}
	_, err := certificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil
}

// opens reports whether the hash of a token opens channel, in a time that does not
// depend on how much of it is right.
func (s *Server) opens(channel string, hash [32]byte) bool {
	if s.opts.Token == "" && s.opts.TokensFile == "" {
		return true
	}
	found, tokens := 0, s.tokens.value()
	if master := sha256.Sum256([]byte(s.opts.Token)); s.opts.Token != "" {
		found = subtle.ConstantTimeCompare(hash[:], master[:])
	}
	for _, list := range [][][32]byte{tokens.Default, tokens.Named[channel]} {
		for _, want := range list {
			found |= subtle.ConstantTimeCompare(hash[:], want[:])
		}
	}
	return found == 1
}

// authorise admits a subscriber's request to channel, or answers it. Unknown
// and forbidden channels get the same answer.
func (s *Server) authorise(w http.ResponseWriter, r *http.Request, method, channel string) (addr netip.Addr, credential Credential, ok bool) {
	addr, err := s.remote(r)
	token := r.Header.Get("X-Auth-Token")
	if scheme, bearer, _ := strings.Cut(r.Header.Get("Authorization"), " "); token == "" && strings.EqualFold(scheme, "Bearer") {
		token = strings.TrimSpace(bearer)
	}
	credential.Token = sha256.Sum256([]byte(token))
	if r.TLS != nil {
		credential.Certificates = r.TLS.PeerCertificates
	}
	var refused *refusal
	switch {
	case !validName(channel):
		refused = errChannel
	case r.Method != method:
		w.Header().Set("Allow", method)
		refused = errMethod
	case s.opts.SubscribeAllowed != nil && (err != nil || !contains(s.opts.SubscribeAllowed, addr)):
		refused = errAddress
	default:
		refused = s.denies(channel, credential)
	}
	switch refused {
	case nil:
		return addr, credential, true
	case errCertificate:
		w.Header().Set("Connection", "close") // the next one brings the certificate that is good by then
	case errToken:
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	s.reject(w, r, channel, refused, nil)
	return addr, credential, false
}

// reject refuses a stream or a report.
func (s *Server) reject(w http.ResponseWriter, r *http.Request, channel string, refused *refusal, err error) {
	s.Rejected[refused.reason].Add(1)
	message := "subscriber refused"
	if r.Method == http.MethodPost {
		message = "report refused"
	}
	addr, _ := s.remote(r)
	attrs := []any{"channel", shown(channel), "addr", addr, "client", clientName(r), "status", refused.status, "reason", refused.message}
	if err != nil {
		attrs = append(attrs, "err", err)
	}
	s.log.Warn(message, attrs...)
	refuse(w, r, refused)
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
	chunked   bool      // HTTP/1.1 on a hijacked connection
	most      int       // bytes of one write
	until     time.Time // the write deadline
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
			sub.Responds = sub.Client != ""
		case "drain":
			sub.Drains = true
		}
	}
	if r.ContentLength != 0 { // it would fill HTTP/2's buffers while the stream lasts
		s.reject(w, r, channel, errUnwanted, nil)
		return
	}
	st := &stream{server: s, sub: sub, most: math.MaxInt}
	sub.Write = st.write
	if err := s.enter(sub); err != nil {
		if err == errLeaving {
			s.reject(w, r, channel, errLeaving, nil)
		} else {
			s.reject(w, r, channel, errLimit, err)
		}
		return
	}
	if denied := s.denies(channel, credential); denied != nil { // revoked before the hub could evict it
		s.abandon(sub, errRevoked)
		s.reject(w, r, channel, denied, nil)
		return
	}
	if !s.awaitLive(r.Context(), sub) {
		s.abandon(sub, errPeerGone)
		s.reject(w, r, channel, errBus, nil)
		return
	}
	if r.ProtoMajor > 1 {
		st.most = pieceOverHTTP2
		s.serveResponse(w, r, st)
	} else {
		st.chunked = r.ProtoAtLeast(1, 1)
		s.serveConn(w, r, st)
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
	if !finished(s.hub.Reason(st.sub)) {
		out.SetWriteDeadline(past)
	}
	st.end()
}

// serveConn takes the connection and streams over it. A fresh, small goroutine
// waits for its end, so that the handler's, whose stack has grown, can finish.
func (s *Server) serveConn(w http.ResponseWriter, r *http.Request, st *stream) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.abandon(st.sub, err)
		s.reject(w, r, st.sub.Channel, errConnection, err)
		return
	}
	sent := buffered.Reader.Buffered()
	st.begin(connSink{conn}, func() { conn.SetDeadline(past) }, openConn(st.chunked))
	go func() { // ends with the connection; end counts it out
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

// enter takes sub in unless the server is leaving; streams.Done counts it out. Both
// under mu, so that whoever asks all streams to move sees it.
func (s *Server) enter(sub *Subscriber) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving {
		return errLeaving
	}
	if err := s.hub.Subscribe(sub); err != nil {
		return err
	}
	s.streams.Add(1)
	return nil
}

// abandon ends a stream that never began. It may have been given events.
func (s *Server) abandon(sub *Subscriber, reason error) {
	s.hub.Leave(sub, reason)
	s.tellLeft(sub)
	s.streams.Done()
}

// tellReady tells all replicas that sub can take events; begun is its ID when its
// stream begins. It stays out of write, which otherwise outgrows the stack that a
// goroutine begins with.
//
//go:noinline
func (s *Server) tellReady(sub *Subscriber, begun string) {
	s.bus.Tell(Signal{Kind: signalReady, From: s.opts.Replica, Channel: sub.Channel, Subscriber: begun, Client: sub.Client})
}

// tellLeft tells all replicas that sub is gone.
func (s *Server) tellLeft(sub *Subscriber) {
	s.bus.Tell(Signal{Kind: signalLeft, From: s.opts.Replica, Channel: sub.Channel, Subscriber: sub.ID})
}

// awaitLive waits until the bus has confirmed the subscription; not for long while
// the bus is away, as another replica may be well.
func (s *Server) awaitLive(ctx context.Context, sub *Subscriber) bool {
	patience := liveTimeout
	if s.bus.Check(ctx) != nil {
		patience = awayTimeout
	}
	select {
	case <-sub.Live:
		return true
	case <-ctx.Done():
	case <-s.giveUp:
	case <-time.After(patience):
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
	st.heartbeat = alarm(st.beat)
	st.heartbeat.Reset(s.opts.Heartbeat)
	if age := s.opts.StreamMaxAge; age > 0 {
		age -= mathrand.N(age/10 + 1) // not all streams of a replica at once
		st.ages = []*time.Timer{
			time.AfterFunc(age, func() { s.askToMove(sub) }),
			time.AfterFunc(age+s.opts.HandlerTimeout, func() { s.hub.Finish(sub, errStreamAge) }),
			time.AfterFunc(age+2*s.opts.HandlerTimeout, func() { s.hub.Leave(sub, errOverdue) }),
		}
	}
	s.tellReady(sub, sub.ID)
	st.write()
}

// finished reports whether a stream ended for reason after its last write.
func finished(reason error) bool {
	return reason == errShutdown || reason == errStreamAge
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
	level, reason, age := slog.LevelInfo, s.hub.Reason(sub), time.Since(sub.Since)
	if conn, ok := st.out.(connSink); ok {
		if st.chunked && finished(reason) { // the body is complete
			conn.SetWriteDeadline(time.Now().Add(lastChunkTime))
			io.WriteString(conn, "0\r\n\r\n")
		}
		conn.Close()
	}
	s.tellLeft(sub)
	if reason == errStuck || reason == errRevoked {
		level = slog.LevelWarn
	}
	s.log.Log(context.Background(), level, "subscriber gone", "channel", sub.Channel, "subscriber", sub.ID, "client", sub.Client, "age", age, "reason", reason)
	s.streams.Done()
}

// beat is the heartbeat, whatever else is sent.
func (st *stream) beat() {
	if st.server.hub.Push(st.sub, heartbeatEvent) {
		st.server.Heartbeats.Add(1)
		st.heartbeat.Reset(st.server.opts.Heartbeat)
	}
}

// AskToMove asks all streams to move, because this replica is cut off from the
// bus and another one may not be. They stay open: when nobody answers, they are
// all that the clients have. A client that did move ends its old one itself.
func (s *Server) AskToMove() {
	subs := s.hub.Subscribers()
	if len(subs) > 0 {
		s.log.Warn("cut off from redis: streams are asked to move", "count", len(subs))
	}
	for _, sub := range subs {
		time.AfterFunc(mathrand.N(moveJitter), func() { s.askToMove(sub) })
	}
}

// askToMove sends drain to a client that knows it.
func (s *Server) askToMove(sub *Subscriber) {
	if sub.Drains {
		sub.Moving.Store(true)
		s.hub.Push(sub, drainEvent)
	}
}

// send writes p, or fails when the subscriber is gone, or stuck: when nothing of
// p was taken for writeTimeout. Every error ends the stream.
func (st *stream) send(p []byte) error {
	for {
		// The deadline first: whoever ends the subscriber sets Gone and then a
		// deadline in the past, which must stay. Not every write moves it, as
		// that costs as much as the rest of a small one.
		if now := time.Now(); st.until.Sub(now) < writeTimeout {
			st.until = now.Add(writeTimeout + writeTimeout/2)
			if err := st.out.SetWriteDeadline(st.until); err != nil {
				return err
			}
		}
		if st.sub.Gone.Load() {
			return errPeerGone
		}
		n, err := st.out.Write(p[:min(len(p), st.most)])
		if err == nil {
			err = st.out.Flush()
		}
		late := errors.Is(err, os.ErrDeadlineExceeded) && !st.sub.Gone.Load()
		switch p = p[n:]; {
		case late && n > 0 && st.most > pieceOverHTTP2: // a slow one that reads goes on
		case late:
			st.server.hub.Evicted.Add(1)
			return errStuck
		case err != nil:
			return fmt.Errorf("write to stream: %w", err)
		case len(p) == 0:
			if st.most == pieceOverHTTP2 { // which resets a stream whose deadline passes, even an idle one
				st.until = time.Time{}
				return st.out.SetWriteDeadline(time.Time{})
			}
			return nil
		}
	}
}

// pieceOverHTTP2 is how much is written at once where a write that timed out
// does not tell how much of it was taken.
const pieceOverHTTP2 = 64 << 10

// write is Subscriber.Write: every batch is one write.
func (st *stream) write() {
	s, sub := st.server, st.sub
	var few [8]*Event
	for dst := few[:0]; ; {
		batch, space := sub.Take(dst)
		if space {
			s.tellReady(sub, "")
		}
		if len(batch) == 0 {
			return
		}
		err := st.sendBatch(batch)
		for _, e := range batch {
			if err != nil { // net/http may still read what it failed to write
				e.owner().kept.Store(true)
			}
			e.release()
		}
		if err != nil {
			s.hub.Leave(sub, err)
			return
		}
		dst = batch
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

// The end.

// Shutdown takes no new streams, asks clients to move and ends each stream once
// its queue is written, goes on taking webhooks as long as there are streams,
// finishes what is held or hands it over, all within the handler timeout.
func (s *Server) Shutdown() {
	end := time.Now().Add(s.opts.HandlerTimeout)
	last := min(reserve, s.opts.HandlerTimeout/4)
	near := end.Add(-last)
	s.draining.Store(true)
	peers, err := s.others(near)
	s.mu.Lock()
	s.leaving, s.alone = true, err == nil && len(peers) == 0
	s.mu.Unlock()
	s.move(near)
	cut := time.AfterFunc(time.Until(end.Add(-last/2)), func() {
		for _, sub := range s.hub.Subscribers() {
			s.hub.Leave(sub, errOverdue)
		}
	})
	defer cut.Stop()
	s.await(near, func() bool { n, _ := s.hub.Count(); return n == 0 })
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	if peers, err = s.others(near); err != nil {
		s.log.Warn("other replicas are not known", "err", err)
	}
	s.await(near, func() bool { return s.settled(len(peers) > 0) })
	close(s.giveUp)
	if now, err := s.others(end); err == nil { // some may have come or gone meanwhile
		peers = now
	}
	s.handOver(peers, end)
	for _, wait := range []*sync.WaitGroup{&s.requests, &s.streams} { // an answer or a stream may be stuck in its connection, which our caller closes
		select {
		case <-done(wait):
		case <-time.After(time.Until(end)):
		}
	}
}

// others are the names of the other replicas, if they are known before end.
func (s *Server) others(end time.Time) ([]string, error) {
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	return s.bus.Peers(ctx)
}

// await looks whether ok holds until it does, or until end.
func (s *Server) await(end time.Time, ok func() bool) {
	for !ok() && time.Until(end) > 0 {
		time.Sleep(min(20*time.Millisecond, time.Until(end)))
	}
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

// move asks all streams to move, spread over moveJitter, and ends each when its
// client has had the time to: once its queue is written, and, until near, once
// nothing waits for space in it.
func (s *Server) move(near time.Time) {
	jitter, patience := min(moveJitter, s.opts.HandlerTimeout/8), min(moveTime, s.opts.HandlerTimeout/4)
	for _, sub := range s.hub.Subscribers() {
		asked := mathrand.N(jitter + 1)
		time.AfterFunc(asked, func() { s.askToMove(sub) })
		var finish func()
		finish = func() {
			if time.Until(near) > 0 && s.waitsFor(sub.Channel) {
				time.AfterFunc(min(lookInterval, max(time.Until(near), 1)), finish)
				return
			}
			s.hub.Finish(sub, errShutdown)
		}
		time.AfterFunc(asked+patience, finish)
	}
}

// What the status page shows.

// ServerState is what the status page shows of a server: everything in total, and
// some of the channels and subscribers one by one.
type ServerState struct {
	Streams  int            `json:"streams"`
	Channels int            `json:"channels"`
	Held     HeldState      `json:"held"`
	List     []ChannelState `json:"list"`
}

// HeldState is how many webhooks are held, and the bytes that they, what is being
// read and what is queued take of their limit.
type HeldState struct {
	Webhooks int   `json:"webhooks"`
	Bytes    int64 `json:"bytes"`
	Limit    int64 `json:"limit"`
}

// ChannelState is one channel with subscribers.
type ChannelState struct {
	Channel     string            `json:"channel"`
	Held        int               `json:"held"`
	Count       int               `json:"count"` // of all its subscribers
	Subscribers []SubscriberState `json:"subscribers"`
}

// State is the server now.
func (s *Server) State() (state ServerState) {
	state.Streams, state.Channels = s.hub.Count()
	state.Held = s.Held()
	channels := slices.Sorted(slices.Values(s.hub.Channels()))
	for _, channel := range channels[:min(len(channels), channelsShown)] {
		one := ChannelState{Channel: channel}
		one.Subscribers, one.Count = s.hub.States(channel, subscribersShown)
		slices.SortFunc(one.Subscribers, func(a, b SubscriberState) int { return a.Since.Compare(b.Since) })
		s.mu.Lock()
		if l := s.lines[channel]; l != nil {
			one.Held = l.holds
		}
		s.mu.Unlock()
		state.List = append(state.List, one)
	}
	return state
}

// Held is what is held now.
func (s *Server) Held() HeldState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return HeldState{len(s.holds), s.budget.Used(), s.budget.Limit}
}
