{{/* What head and worker have in common. Arguments: root, name, pool (its values), env, mounts, volumes, readiness. */}}
{{- define "diptych.pod" -}}
metadata:
  labels:
    {{- include "diptych.podLabels" .root | nindent 4 }}
  annotations:
    # Read when the application starts: another configuration is another cluster.
    diptych/config-sha256: {{ include "diptych.config" .root | sha256sum }}
spec:
  serviceAccountName: {{ include "diptych.serviceAccountName" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .grace }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ .root.Values.runAsUser | int }}
    runAsGroup: {{ .root.Values.runAsUser | int }}
    fsGroup: {{ .root.Values.runAsUser | int }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .pool.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .pool.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "diptych.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      env:
        - name: HOME
          value: /tmp
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        - name: HF_HUB_OFFLINE
          value: "1"
        - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
          value: {{ .drain | quote }}
      resources:
        requests:
          cpu: {{ .pool.cpu | quote }}
          memory: {{ .pool.memory }}
        limits:
          memory: {{ .pool.memory }}
          {{- with .pool.gpus }}
          nvidia.com/gpu: {{ . | int }}
          {{- end }}
      {{- with .readiness }}
      readinessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: config
          mountPath: /etc/diptych
          readOnly: true
        - name: tmp
          mountPath: /tmp
        - name: cache
          mountPath: /cache
        - name: shm
          mountPath: /dev/shm
        {{- if .root.Values.models.claimName }}
        - name: models
          mountPath: {{ .root.Values.models.path }}
          readOnly: true
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "diptych.name" .root }}
    - name: tmp
      emptyDir: {}
    - name: cache
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .shm }}
    {{- if .root.Values.models.claimName }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ .root.Values.models.claimName }}
        readOnly: true
    {{- end }}
{{- end -}}
